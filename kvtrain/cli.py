"""The one door: ``kvtrain <command>``. Every command imports its own room only when it is called."""

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvtrain.errors import UsageError, in_one_line, is_mistake, require_at_least, unknown
from kvtrain.launcher import adopt_local_rank
from kvtrain.parser import Parser, add_device_argument, add_method_argument, finite
from kvtrain.stop_signals import INTERRUPTED_EXIT_CODE, StopSignals
from kvtrain.tables import print_table

DEBUG = "KVTRAIN_DEBUG"
_USAGE_EXIT_CODE = 2
_PAGE_WIDTH = 100
# Of packages that transformers imports where they are installed; what they say then nobody can change.
_IMPORT_REMARKS = ("torchao", "torch.utils._pytree")


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Attributes:
        summary: Its line in ``kvtrain --help``.
        run: What it does with the rest of the command line.
        add_arguments: Declares its options; None where its options are those of a recipe.
    """

    summary: str
    run: Callable[[list[str]], None]
    add_arguments: Callable[[Parser], None] | None = None


def build_parser(name: str) -> Parser:
    """The parser of a command that has one of its own."""
    command = COMMANDS[name]
    parser = Parser(
        prog=f"kvtrain {name}",
        description=f"{command.summary}.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=_PAGE_WIDTH),
    )
    assert command.add_arguments is not None
    command.add_arguments(parser)
    return parser


def command_page() -> str:
    """The page of ``kvtrain --help``."""
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: kvtrain <command> [options]",
            "",
            "Train, retrofit and serve language models whose KV cache is small by construction.",
            "",
            "commands:",
            *lines,
            "",
            "kvtrain <command> --help says more, kvtrain --version the version.",
            f"{DEBUG}=1 in the environment shows the traceback of every error.",
            "",
        ]
    )


def _fit(arguments: list[str]) -> None:
    with StopSignals():
        from kvtrain.training.cli import main as run

        run("fit", arguments)


def _validate(arguments: list[str]) -> None:
    from kvtrain.training.cli import main as run

    run("validate", arguments)


def _recipes_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--launchers", action="store_true", help="list what starts a recipe on many GPUs and machines instead"
    )
    parser.add_argument("--copy", metavar="DIR", help="also copy what is listed into this new folder, to be changed")


def _recipes(arguments: list[str]) -> None:
    asked = build_parser("recipes").parse_args(arguments)
    from kvtrain.recipes import copy_files, launchers_folder, list_launchers, list_recipes, recipes_folder, shown

    if asked.copy:
        copy_files(launchers_folder() if asked.launchers else recipes_folder(), Path(asked.copy))
    if asked.launchers:
        starts = [(shown(launcher.path), launcher.purpose, launcher.needs) for launcher in list_launchers()]
        print_table(("launcher", "purpose", "needs"), starts)
    else:
        rows = [(shown(recipe.path), recipe.purpose, recipe.scale, recipe.hardware) for recipe in list_recipes()]
        print_table(("recipe", "purpose", "scale", "hardware"), rows)


def _config_argument(parser: Parser) -> None:
    parser.add_argument("--config", action="append", required=True, metavar="RECIPE", help="recipe; may be repeated")


def _parse_recipe(command: str, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, and the recipe with what changes it as ``kvtrain fit`` would be given them."""
    asked, overrides = build_parser(command).parse_known_args(arguments)
    return asked, [*(f"--config={path}" for path in asked.config), *overrides]


def _estimate_arguments(parser: Parser) -> None:
    _config_argument(parser)
    parser.add_argument("--devices", type=int, metavar="N", help="what one of so many ranks holds")
    parser.add_argument(
        "--strategy", metavar="S", help="ddp, fsdp2, zero2, zero3 or zero3_offload, in place of the recipe's"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.epilog = (
        "Any setting of the recipe can be changed as with kvtrain fit: --data.batch_size 4. Memory is that of tensors. "
        "In main memory glibc holds on to freed ones, up to half as much again, unless MALLOC_MMAP_THRESHOLD_=65536 "
        "is in the environment, which slows training."
    )


def _estimate(arguments: list[str]) -> None:
    asked, recipe_arguments = _parse_recipe("estimate", arguments)
    from kvtrain.training.cli import read_recipe
    from kvtrain.training.estimate import estimate_recipe, table_rows

    require_at_least(1, "--devices", asked.devices)
    recipe = read_recipe(recipe_arguments)
    figures = estimate_recipe(*recipe, strategy=asked.strategy, ranks=asked.devices)
    if asked.json:
        print(json.dumps(figures.to_dict(), indent=1))
    else:
        print_table(("", "one rank" if figures.strategy else "one device, unsharded"), table_rows(figures))


def _check_arguments(parser: Parser) -> None:
    _config_argument(parser)
    parser.add_argument(
        "--timeout", type=finite, default=300.0, metavar="S", help="seconds to wait for processes (300)"
    )
    parser.add_argument("--no-step", action="store_true", help="read no data and train no micro-batch")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.epilog = (
        "Start it as the training will be started (launch/torchrun.sh check --config RECIPE), with the same options. "
        "It looks at ranks, addresses, the time of an all-reduce, run folder, free space, memory a rank and versions. "
        "A process that trains alone also reads its data, shows the first of it with what is learned, and trains one "
        "micro-batch of the whole model. The first rank prints, and the exit code is 2 where something is to be mended."
    )


def _check(arguments: list[str]) -> None:
    asked, recipe_arguments = _parse_recipe("check", arguments)
    if asked.timeout <= 0:
        raise UsageError(f"--timeout must be above 0, not {asked.timeout}")
    from kvtrain.data.picture import print_sample
    from kvtrain.training.preflight import check_launch

    with check_launch(recipe_arguments, asked.timeout, not asked.no_step) as outcome:
        if outcome.rank == 0 and asked.json:
            print(json.dumps([finding._asdict() for finding in outcome.findings], indent=1), flush=True)
        elif outcome.rank == 0:
            rows = [(finding.subject, finding.found, finding.remedy or "ok") for finding in outcome.findings]
            print_table(("", "found", "verdict"), rows)
            if outcome.text:
                print_sample("the first row", outcome.text)
    if outcome.failed:
        raise SystemExit(_USAGE_EXIT_CODE)


def _generate_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="exported folder, Hub id or kvtrain:tiny")
    parser.add_argument("--prompt", required=True, help="text to go on from")
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="answer the prompt, put into the tokenizer's chat template"
    )
    add_method_argument(parser)
    add_device_argument(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add (64)")
    parser.add_argument("--temperature", type=finite, default=0.0, metavar="X", help="0 takes the likeliest token (0)")
    parser.add_argument("--top-p", type=finite, default=1.0, metavar="X", help="sample from this share of the mass (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")


def _generate(arguments: list[str]) -> None:
    asked = build_parser("generate").parse_args(arguments)
    from kvtrain.inference.generate import generate_text
    from kvtrain.models.parse_method import parse_method

    generation = generate_text(
        asked.model,
        asked.prompt,
        method=None if asked.method is None else parse_method(asked.method),
        device=asked.device,
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=asked.seed,
        chat_template=asked.apply_chat_template,
    )
    print(generation.text)
    print(generation.facts(), file=sys.stderr)


def _in_module(name: str, module: str, summary: str) -> Command:
    """A command that a module holds by itself, as ``add_arguments`` and ``run``; imported when it is asked for."""

    def add_arguments(parser: Parser) -> None:
        importlib.import_module(module).add_arguments(parser)

    def run(arguments: list[str]) -> None:
        importlib.import_module(module).run(build_parser(name).parse_args(arguments))

    return Command(summary, run, add_arguments)


COMMANDS = {
    "fit": Command("Train what a recipe describes, or go on with a run", _fit),
    "validate": Command("Measure a recipe's model on its held-out text", _validate),
    "recipes": Command("List the recipes, or the launchers for many machines", _recipes, _recipes_arguments),
    "estimate": Command("Say what a recipe needs, without allocating a weight", _estimate, _estimate_arguments),
    "check": Command("Look a launch over before it trains: ranks, network, disk, memory", _check, _check_arguments),
    "prepare": _in_module("prepare", "kvtrain.data.prepare_command", "Tokenise a corpus or chats into shards, once"),
    "export": _in_module("export", "kvtrain.export.export_command", "Write a run's model as a Hugging Face folder"),
    "push": _in_module("push", "kvtrain.export.push_command", "Upload an exported folder to the Hub, in one commit"),
    "generate": Command("Continue a text and say what the cache cost", _generate, _generate_arguments),
    "serve": _in_module(
        "serve", "kvtrain.inference.server.command", "Serve a model to many at once, in OpenAI's form, with a page"
    ),
    "eval": _in_module("eval", "kvtrain.evaluation.eval_command", "Measure a model: a table, and JSON"),
    "report": _in_module(
        "report", "kvtrain.evaluation.report_command", "Draw a run, or what several methods lose and save"
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line; ``kvtrain_cli.main``, which is what a shell calls, answers calls for help before.

    Args:
        argv: What follows ``kvtrain``; None takes it from the process.

    Returns:
        The exit code: 0, 2 for a mistake of the caller, 130 when interrupted, 143 when asked to stop by a signal.

    Raises:
        Exception: Whatever is no mistake of the caller keeps its traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return _run(adopt_local_rank(arguments))
    except KeyboardInterrupt as interruption:
        return _complain(str(interruption) or "interrupted", INTERRUPTED_EXIT_CODE)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception as error:
        _record(error)
        if os.environ.get(DEBUG) or not is_mistake(error):
            raise
        return _complain(f"error: {in_one_line(error)}", _USAGE_EXIT_CODE)


def _run(arguments: list[str]) -> int:
    if not arguments:
        raise UsageError("no command given. See kvtrain --help")
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise UsageError(unknown("command", name, COMMANDS, "See kvtrain --help"))
    for logger in map(logging.getLogger, _IMPORT_REMARKS):
        logger.setLevel(logging.ERROR)
    COMMANDS[name].run(rest)
    return 0


def _complain(line: str, exit_code: int) -> int:
    print(f"kvtrain: {line}", file=sys.stderr)
    return exit_code


def _record(error: Exception) -> None:
    """Leave an error where torchrun looks for it, which names the rank that failed first and its error at the end."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


if __name__ == "__main__":
    raise SystemExit(main())
