"""Mistakes of the person at the keyboard: one error for all of them, and the nearest right name."""

import difflib
import errno
import logging
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class UsageError(ValueError):
    """Something on the command line or in a recipe is wrong; the message says what, and the remedy."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that ``name`` most likely meant, or None."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown(kind: str, name: str, candidates: Iterable[str], otherwise: str = "") -> str:
    """Say that a name is unknown, and which one was most likely meant.

    Args:
        kind: What the name was to be, such as ``"option"``.
        name: What was given.
        candidates: Valid names.
        otherwise: What to say where no candidate is near.
    """
    meant = nearest(name, candidates)
    hint = f"Did you mean '{meant}'?" if meant else otherwise
    return f"unknown {kind} '{name}'. {hint}" if hint else f"unknown {kind} '{name}'"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that it came from, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def reason(error: BaseException) -> BaseException:
    """What a library's error stands for: a wish to stop, or an error of the system, that it came from; else itself."""
    kinds = (KeyboardInterrupt, SystemExit, OSError)
    return next((cause for cause in causes(error) if isinstance(cause, kinds)), error)


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its first, and what follows where that ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    end = next((number for number, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:end])


def is_mistake(error: BaseException) -> bool:
    """Whether kvtrain itself refused something, or a file could not be had; the rest are defects."""
    if isinstance(error, OSError):
        return error.filename is not None
    return isinstance(error, UsageError) or (isinstance(error, ValueError) and raised_by_kvtrain(error))


def in_one_line(error: BaseException) -> str:
    """All that an error says; of the system's errors, with the file and, where that helps, the remedy."""
    if isinstance(error, OSError):
        remedy = "; make room there" if error.errno in NO_ROOM else ""
        return f"{error.filename}: {error.strerror}{remedy}"
    return " ".join(str(error).split())


def raised_by(error: BaseException, *folders: str) -> bool:
    """Whether a ``raise`` in a file below one of these folders made it: a refusal, not a slip."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(folders) and (frames[-1].line or "").startswith("raise ")


def raised_by_kvtrain(error: BaseException) -> bool:
    """Whether a ``raise`` of kvtrain's own made it: a library's error, or one of Python itself, is a defect."""
    return raised_by(error, _PACKAGE)


@contextmanager
def explain_load_errors(name: str, remedy: str = "give a folder, a Hub id or kvtrain:tiny") -> Iterator[None]:
    """Say in a line what is wrong with a model that somebody named; what happens in kvtrain's own code stays as it is.

    Configurations and weights are read by five libraries, whose errors have nothing in common.

    Args:
        name: As it was given.
        remedy: What to do.

    Raises:
        UsageError: A library could not read it.
    """
    try:
        with _held_back("transformers"):  # its report of what does not fit would stand before the line that says so
            yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if len(frames) > 1 and frames[-1].filename.startswith(_PACKAGE):
            raise
        if (Path(name) / "checkpoints").is_dir():
            raise UsageError(f"{name} is a run folder; write its model with `kvtrain export {name} OUT`") from error
        kind = "no model at" if isinstance(error, OSError) else "no model that can be opened at"
        raise UsageError(f"{kind} {name!r} ({_reason(error)}); {remedy}") from error


def _reason(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says"
    return first_line(error)


@contextmanager
def _held_back(library: str) -> Iterator[None]:
    """Keep what a library logs until it is through; where it fails, its error says enough."""
    handlers, held = logging.getLogger(library).handlers, list[logging.LogRecord]()

    def hold(record: logging.LogRecord) -> bool:
        if record not in held:  # every handler asks
            held.append(record)
        return False

    for handler in handlers:
        handler.addFilter(hold)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(hold)
    for record in held:
        logging.getLogger(record.name).handle(record)


def require_at_least(least: int, name: str, number: float | None) -> None:
    """Refuse a number that is too small; None passes.

    Raises:
        UsageError: It is.
    """
    if number is not None and number < least:
        raise UsageError(f"{name} must be at least {least}, not {number}")


def require_seed(name: str, seed: int) -> None:
    """Refuse what is no seed for torch and NumPy alike.

    Raises:
        UsageError: It is negative, or has more than 63 bits.
    """
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"{name} must be from 0 to {(1 << 63) - 1}, not {seed}")


def require_file_place(path: Path) -> None:
    """Make sure, before there is anything to write, that a file can be written.

    Raises:
        UsageError: It is a folder, or the folder above is not there or may not be written.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{path} may not be written; choose another file")
