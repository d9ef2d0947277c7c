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
