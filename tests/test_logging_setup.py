"""kvtrain's own lines on standard error."""

import io
import logging
import sys

from kvtrain.logging_setup import configure_logging


def test_lines_go_to_standard_error_as_it_is_when_they_are_written(monkeypatch):
    """So that a progress bar, which takes it over, keeps its own line."""
    logger = logging.getLogger("kvtrain")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    configure_logging()
    taken_over = io.StringIO()
    monkeypatch.setattr(sys, "stderr", taken_over)
    logger.info("a fact")
    logger.warning("a doubt")
    assert taken_over.getvalue() == "a fact\nkvtrain: warning: a doubt\n"


def test_deepspeed_writes_nothing_where_results_stand(capsys):
    """It logs to standard output, and ``--json`` would be no JSON."""
    library = logging.getLogger("DeepSpeed")
    before, handler = (list(library.filters), library.level), logging.StreamHandler(sys.stdout)
    library.addHandler(handler)
    try:
        configure_logging()
        library.setLevel(logging.INFO)
        library.info("chatter")
        library.warning("Setting accelerator to CPU. If you have GPU ...")
        library.warning("something to know")
    finally:
        library.removeHandler(handler)
        library.filters[:], library.level = before
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "DeepSpeed: something to know\n"
