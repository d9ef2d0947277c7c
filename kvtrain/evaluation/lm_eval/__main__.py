"""``python -m kvtrain.evaluation.lm_eval``: lm-eval's own command line, which knows ``--model kvtrain``."""

import sys
from collections.abc import Sequence

from kvtrain.errors import in_one_line, is_mistake
from kvtrain.evaluation.lm_eval import MODEL_NAME, refused_by_lm_eval, register
from kvtrain.inference.device import pick_device

_HELP = (
    "lm-eval's command line, which measures through the cache that serves: --model kvtrain is added where no model is "
    "named, --model_args are those of kvtrain.evaluation.lm_eval.model.ServedLM, such as "
    "pretrained=kvtrain:tiny 'method=H2O(budget=256, recent=128)' decode=True"
)
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
        _run(_with_defaults(arguments))
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


def _with_defaults(arguments: list[str]) -> list[str]:
    """With our model, and a device that is there, where something is to be run and none is named.

    lm-eval's own are a model that scores without a cache, and a GPU.
    """
    named = {argument.split("=")[0] for argument in arguments}
    if not named & {"--tasks", "-t"} or named & {"--config", "-C"}:
        return arguments
    model = [] if named & {"--model", "-M"} else ["--model", MODEL_NAME]
    device = [] if "--device" in named else ["--device", str(pick_device())]
    return [*arguments, *model, *device]


if __name__ == "__main__":
    raise SystemExit(main())
