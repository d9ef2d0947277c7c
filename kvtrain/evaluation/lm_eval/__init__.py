"""lm-eval's tasks through the cache that serves (extra ``eval``); importing this needs nothing of lm-eval."""

import importlib.util

from kvtrain.errors import UsageError, raised_by

MODEL_NAME = "kvtrain"  # in lm-eval's registry: --model kvtrain


def require_lm_eval() -> None:
    """Say so where lm-eval is missing.

    Raises:
        ValueError: It is.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("lm-eval is not installed: pip install 'kvtrain[eval]'")


def register() -> None:
    """Let lm-eval know the model class, which is imported when it is asked for.

    Raises:
        ValueError: lm-eval is not installed.
    """
    require_lm_eval()
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target="kvtrain.evaluation.lm_eval.model:ServedLM")


def refused_by_lm_eval(error: BaseException) -> bool:
    """Whether lm-eval itself refused what it was given."""
    import lm_eval

    return isinstance(error, ValueError) and raised_by(error, *lm_eval.__path__)
