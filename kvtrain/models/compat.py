"""What differs between the versions of transformers that kvtrain runs with; nothing else asks for a version.

From 5.24 on a forward pass, its output and ``generate`` call their cache ``cache``; before, ``past_key_values``.
Callers may use either name under any version.
"""

import logging
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar

import transformers
from packaging.version import Version

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput

logger = logging.getLogger("kvtrain")

# The versions that `make test-versions` runs; constraints.txt and constraints-newest.txt pin those between.
OLDEST_TESTED, NEWEST_TESTED = "5.17", "5.24"

Output = TypeVar("Output", bound="ModelOutput")
_NAMES = ("cache", "past_key_values")
CACHE = "cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values"
"""How this version of transformers calls a forward pass' cache."""


def rename_cache(arguments: MutableMapping[str, Any]) -> Any:
    """Call the cache among a call's arguments as this version does, in place, and return it; None where there is none.

    Raises:
        ValueError: It was passed under both names.
    """
    given = {name: arguments.pop(name) for name in _NAMES if name in arguments}
    caches = [cache for cache in given.values() if cache is not None]
    if len(caches) > 1:
        raise ValueError("cache= and past_key_values= are one argument under two names; pass one of them")
    if given:
        arguments[CACHE] = caches[0] if caches else None
    return arguments.get(CACHE)


def with_cache(output: Output, cache: Any) -> Output:
    """A forward pass' output with its cache, where there is one."""
    if cache is not None:
        output[CACHE] = cache
    return output


def without_cache(output: Any, cache: Any) -> Any:
    """A decoder's output without its cache, which some hosts give back unasked."""
    if isinstance(output, tuple):
        return tuple(part for part in output if part is not cache or cache is None)
    if output.get(CACHE) is not None:
        output[CACHE] = None
    return output


def say_if_untested(version: str = transformers.__version__) -> None:
    """Log a line where transformers is newer than any version that kvtrain was tested with."""
    if Version(version).release[:2] > Version(NEWEST_TESTED).release[:2]:
        logger.warning(
            "kvtrain is tested with transformers %s to %s, and this is %s: should something fail, try "
            "`pip install 'transformers<=%s.99'`",
            OLDEST_TESTED,
            NEWEST_TESTED,
            version,
            NEWEST_TESTED,
        )
