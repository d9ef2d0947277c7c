"""Parsing the commands that have options of their own: what is wrong with them fits a line."""

import argparse
import math
import re
from typing import NoReturn

from kvtrain.errors import UsageError, unknown

_SIZE = "a size such as 512MiB or 4GiB"
_UNITS = {"": 1, **{f"{letter}iB": 1 << 10 * power for power, letter in enumerate("KMGT", 1)}}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def parse_args(self, words: list[str]) -> argparse.Namespace:  # type: ignore[override]
        """Parse; a misspelt option is named before what is missing because of it."""
        known = {string for action in self._actions for string in action.option_strings}
        for word in words:
            if word.startswith("--") and word.split("=")[0] not in known:
                self.error(f"unrecognized arguments: {word}")
        asked = super().parse_args(words)
        for action in self._actions:
            given = getattr(asked, action.dest, None)
            if given == "" or (isinstance(given, list) and "" in given):
                name = action.option_strings[-1] if action.option_strings else action.metavar
                self.error(f"argument {name}: expected one argument")
        return asked

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            UsageError: Always.
        """
        raise UsageError(self._explain(message))

    def _explain(self, message: str) -> str:
        if match := re.search(r"unrecognized arguments: (\S+)", message):
            word = match[1].split("=")[0]
            options = [string for action in self._actions for string in action.option_strings]
            if word.startswith("-"):
                return unknown("option", word, options, f"See {self.prog} --help")
            return f"unexpected word '{word}'. See {self.prog} --help"
        if match := re.search(r"argument (\S+): invalid (\w+) value: (.*)", message):
            kind = {"int": "an integer", "finite": "a number", "num_bytes": _SIZE}.get(match[2], match[2])
            return f"{match[1]}: expected {kind}, got {match[3]}"
        if match := re.search(r"argument (\S+): expected (?:at least )?one argument", message):
            return f"option '{match[1]}' needs a value"
        if match := re.search(r"arguments are required: (.*)", message):
            return f"{match[1]} is missing. See {self.prog} --help"
        return message


def add_method_argument(parser: Parser) -> None:
    """Declare ``--method``, which commands take that open a plain model."""
    parser.add_argument(
        "--method", metavar="M", help="of a plain model's cache, such as 'H2O(budget=256, recent=128)' (Full())"
    )


def add_device_argument(parser: Parser) -> None:
    """Declare ``--device``, which commands take that run a model."""
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 ... (a GPU if there is one)")


def finite(text: str) -> float:
    """A number on a command line.

    Raises:
        ValueError: It is none, or infinite.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def num_bytes(text: str) -> int:
    """A size on a command line: ``4GiB``, ``500MB``, or bytes.

    Raises:
        ValueError: It is none.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?(\w*)", text.strip(), re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text} is no size")
    return int(float(match[1]) * _UNITS[match[2]])
