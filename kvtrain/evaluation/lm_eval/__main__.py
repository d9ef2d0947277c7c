"""``python -m kvtrain.evaluation.lm_eval``: lm-eval's own command line, which knows ``--model kvtrain``."""

import sys
from collections.abc import Sequence

from kvtrain.errors import in_one_line, is_mistake
from kvtrain.evaluation.lm_eval import MODEL_NAME, refused_by_lm_eval, register

_HELP = (
    "lm-eval's command line, which measures through the cache that serves: --model kvtrain is added where no model is "
    "named, --model_args are those of kvtrain.evaluation.lm_eval.model.ServedLM, such as "
    "pretrained=kvtrain:tiny 'method=H2O(budget=256, recent=128)' decode=True"
)
_MODEL_OPTIONS = ("--model", "-M", "--config", "-C")
_USAGE_EXIT_CODE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Register the model class, and hand a command line to lm-eval.

    Args:
        argv: What lm-eval's own command takes; None takes it from the process.

    Returns:
        The exit code: 2 for a mistake of the caller, said in one line.

    Raises:
        Exception: Whatever is no mistake of the caller keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        register()
        _run(_with_model(arguments))
    except Exception as error:
        if not (is_mistake(error) or refused_by_lm_eval(error)):
            raise
        print(f"kvtrain.evaluation.lm_eval: error: {in_one_line(error)}", file=sys.stderr)
        return _USAGE_EXIT_CODE
    return 0


def _run(arguments: list[str]) -> None:
    from lm_eval.__main__ import cli_evaluate

    if not arguments or "--help" in arguments or "-h" in arguments:
        print(_HELP + "\n")
    before, sys.argv = sys.argv, ["lm-eval", *arguments]  # where lm-eval looks for it
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _with_model(arguments: list[str]) -> list[str]:
    """With our model where none is named and something is to be run."""
    runs = bool(arguments) and (arguments[0] == "run" or arguments[0].startswith("-"))
    named = any(argument.split("=")[0] in _MODEL_OPTIONS for argument in arguments)
    asks = "--tasks" in arguments or "-t" in arguments
    return [*arguments, "--model", MODEL_NAME] if runs and asks and not named else arguments


if __name__ == "__main__":
    raise SystemExit(main())
