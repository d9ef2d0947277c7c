"""Names that version 0.1 wrote into recipes and folders: taken for one version more, with a warning."""

import functools
import logging
import re
from typing import Any

logger = logging.getLogger("kvtrain")

# Old names and new ones. None of the old is the name of anything else in a recipe or a configuration.
_NAMES = {"regularisation": "regularization", "initialisation": "initialization"}
OLD_NAMES = re.compile("|".join(_NAMES))


def with_new_names(values: Any) -> Any:
    """The same values, keys of mappings at any depth under their present names.

    Args:
        values: As read from YAML or JSON.
    """
    if isinstance(values, list):
        return [with_new_names(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {_new_name(key): with_new_names(value) for key, value in values.items()}


def option_with_new_name(word: str) -> str:
    """A word of a command line; an option's last part may have an old name."""
    option, equals, value = word.partition("=")
    section, dot, name = option.rpartition(".")
    return f"{section}{dot}{_new_name(name)}{equals}{value}" if word.startswith("--") else word


def _new_name(old: Any) -> Any:
    if old not in _NAMES:
        return old
    _say(old, _NAMES[old])
    return _NAMES[old]


@functools.cache
def _say(old: str, new: str) -> None:
    """Say it once."""
    logger.warning("'%s' is now '%s'; the old name goes with version 0.3", old, new)
