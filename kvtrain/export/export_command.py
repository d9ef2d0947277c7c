"""``kvtrain export``: what is wrong with the command line is said before anything is written."""

from argparse import Namespace
from pathlib import Path

from kvtrain.errors import UsageError
from kvtrain.export.push_command import add_target_arguments, push, read_target
from kvtrain.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("run", metavar="RUN", help="run folder of kvtrain fit; with --method a plain model")
    parser.add_argument("output", metavar="OUT", help="new folder for the Hugging Face checkpoint")
    parser.add_argument(
        "--dtype", default="bfloat16", metavar="D", help="of the weights: bfloat16, float16 or float32 (bfloat16)"
    )
    parser.add_argument(
        "--method", metavar="M", help="put this into a plain model, such as 'H2O(budget=256, recent=128)'"
    )
    parser.add_argument(
        "--keep-adapter", action="store_true", help="write the run's LoRA to OUT/adapter, unmerged, for PEFT"
    )
    parser.add_argument("--remote-code", action="store_true", help="add the model's code: opens without kvtrain")
    parser.add_argument("--push-to", metavar="ORG/NAME", help="also upload it to this Hub repository")
    add_target_arguments(parser)


def run(asked: Namespace) -> None:
    """Write a run's model, or a plain one with a method, and push it where that is asked for.

    Raises:
        ValueError: Something about the command line is wrong, the run, or the Hub.
    """
    _require_push_to(asked)
    from kvtrain.export import hf
    from kvtrain.export.push import require_token
    from kvtrain.models.parse_method import parse_method

    method = None if asked.method is None else parse_method(asked.method)
    target = read_target(asked) if asked.push_to else None
    if target is not None:
        require_token()
    output, options = Path(asked.output), (asked.dtype, asked.remote_code)
    if method is not None and asked.keep_adapter:
        raise UsageError("--keep-adapter is of a run with lora; a plain model has no adapter")
    if method is None:
        hf.export_run(Path(asked.run), output, *options, keep_adapter=asked.keep_adapter, hub_id=asked.push_to)
    else:
        hf.export_plain(asked.run, method, output, *options)
    print(output, flush=True)
    if target is not None:
        push(output, target)


def _require_push_to(asked: Namespace) -> None:
    for option, given in (("--private", asked.private), ("--revision", asked.revision)):
        if given and not asked.push_to:
            raise UsageError(f"{option} says something about --push-to, which is missing")
