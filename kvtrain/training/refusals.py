"""What the libraries below refuse before a run has begun, in one line of ours."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from kvtrain.errors import UsageError, causes, raised_by, raised_by_kvtrain
from kvtrain.training.messages import innermost_complaint

# Whose explicit refusals are about what they were given: settings, devices, packages that are missing.
_LIBRARIES = ("lightning", "lightning_utilities", "deepspeed", "wandb")
_PARSER = "jsonargparse"  # whose errors are nests, one level for each type that a value might have had
_LONGEST = 300


@contextmanager
def refusals(until: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Make one line of what a library refuses; slips in anybody's code, and whatever comes later, keep their traceback.

    Args:
        until: Whether the run has begun: from then on errors are no refusals.

    Raises:
        UsageError: Something was refused.
    """
    try:
        yield
    except Exception as error:
        chain = list(causes(error))
        own = next((link for link in chain if raised_by_kvtrain(link)), None)
        refusal = own or next((link for link in reversed(chain) if _refuses(link)), None)
        if until() or refusal is None or own is error:
            raise
        nested = raised_by(refusal, *_folders(_PARSER))
        raise UsageError(_shown(innermost_complaint(str(error)) if nested else str(refusal))) from error


def _refuses(error: BaseException) -> bool:
    checked = isinstance(error, MisconfigurationException) or type(error).__module__.startswith("pydantic")
    return checked or raised_by(error, *_folders(*_LIBRARIES, _PARSER))


def _folders(*packages: str) -> list[str]:
    specs = (find_spec(name) for name in packages)
    return [str(Path(spec.origin).parent) for spec in specs if spec and spec.origin]


def _shown(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."
