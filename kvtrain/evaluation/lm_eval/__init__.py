"""lm-eval's tasks through the cache that serves (extra ``eval``); importing this needs nothing of lm-eval."""

from kvtrain.errors import UsageError, raised_by

MODEL_NAME = "kvtrain"  # in lm-eval's registry: --model kvtrain


def register() -> None:
    """Let lm-eval know the model class, which is imported when it is asked for.

    Raises:
        ValueError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise UsageError("lm-eval is not installed: pip install 'kvtrain[eval]'") from error
    model_registry.register(MODEL_NAME, target="kvtrain.evaluation.lm_eval.model:ServedLM")


def refused_by_lm_eval(error: BaseException) -> bool:
    """Whether lm-eval itself refused what it was given."""
    import lm_eval

    return isinstance(error, ValueError) and raised_by(error, *lm_eval.__path__)
