"""``kvtrain report``: pictures of one run, or of several methods side by side."""

from argparse import Namespace
from pathlib import Path

from kvtrain.errors import UsageError
from kvtrain.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("run", metavar="RUN", nargs="?", help="run folder of kvtrain fit")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="instead of a run, JSON of kvtrain eval: quality over KV bytes while answering, a line a method; "
        "NAME=FILE names its line",
    )
    parser.add_argument("--control", metavar="RUN", help="draw the held-out loss of this run beside")
    parser.add_argument("--log", action="store_true", help="send the pictures to the run's wandb and TensorBoard, too")
    parser.add_argument("--output", metavar="DIR", help="where the pictures go (RUN/report; comparison)")
    parser.epilog = (
        "Where RUN holds an eval.json of kvtrain eval --json, losses and slots by position are drawn too. A comparison "
        "takes tasks that are decoded (continuation; passkey and retrieval with --ask). A model counts as trained with "
        "its method unless that came from --method, or is one that is never trained."
    )


def run(asked: Namespace) -> None:
    """Draw, and print what was written.

    Raises:
        ValueError: A run or files are missing, or both were given, or something in them is damaged.
    """
    if (asked.run is None) == (asked.compare is None):
        what = "RUN is missing" if asked.run is None else "one of RUN and --compare, not both"
        raise UsageError(f"{what}. See kvtrain report --help")
    output = Path(asked.output) if asked.output else None
    if asked.compare and (asked.control or asked.log):
        raise UsageError("--control and --log are of a run; leave them out beside --compare")
    if asked.compare:
        from kvtrain.evaluation.comparison import compare

        written = compare(asked.compare, output)
    else:
        from kvtrain.evaluation.report import report_run
        from kvtrain.evaluation.report_loggers import find_loggers

        loggers = find_loggers(Path(asked.run)) if asked.log else []
        written = report_run(Path(asked.run), output, Path(asked.control) if asked.control else None)
        for send in loggers:
            send([path for path in written if path.suffix == ".png"])
    for path in written:
        print(path)
