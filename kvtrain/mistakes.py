"""Mistakes of the person at the keyboard: one error for all of them, and the nearest right name."""

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


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


def innermost(error: BaseException) -> BaseException:
    """The first error of a chain: what was raised before others wrapped it."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def raised_by_kvtrain(error: BaseException) -> bool:
    """Whether a ``raise`` of kvtrain's own made it: a library's error, or one of Python itself, is a defect."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_PACKAGE) and (frames[-1].line or "").startswith("raise ")
