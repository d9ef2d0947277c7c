"""What the ranks of a run tell each other and the user when one of them ends before the others."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store

from kvtrain.errors import first_line

# Of what gloo and NCCL say to a rank whose peer is gone.
_LOST = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "timed out",
    "remote process exited",
    "timeout",
)
_WAIT = timedelta(seconds=2)  # for a peer's last word
logger = logging.getLogger("kvtrain")


def set_timeout(trainer: pl.Trainer, minutes: float) -> None:
    """Bound how long a rank waits for the others; one device alone has nobody to wait for."""
    if hasattr(trainer.strategy, "_timeout"):
        trainer.strategy._timeout = timedelta(minutes=minutes)


def require_same_step(trainer: pl.Trainer) -> None:
    """Make sure that all ranks go on from one place.

    Raises:
        ValueError: They do not: a file is damaged, or not there, for some of them alone.
    """
    step = torch.tensor(float(trainer.global_step), device=trainer.strategy.root_device)
    first, last = (trainer.strategy.reduce(step.clone(), reduce_op=how).item() for how in ("min", "max"))
    if first != last:
        raise ValueError(f"ranks go on from different steps, {first:.0f} and {last:.0f}; give a --ckpt_path by name")


@contextmanager
def together(trainer: pl.Trainer) -> Iterator[None]:
    """Work on the run folder that all ranks do, or some: where the system fails one of them, it fails all.

    Otherwise the others would wait for it, until their timeout. The work may hold an exchange between the ranks only if
    none of them misses it for such an error.

    Raises:
        OSError: This rank's own, or that of the first rank that has one.
    """
    own: OSError | None = None
    try:
        yield
    except OSError as error:
        if trainer.world_size == 1:
            raise
        own = error
    if trainer.world_size == 1:
        return
    found: list[tuple[Any, ...] | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, own and (own.errno, own.strerror, own.filename))
    first = next((parts for parts in found if parts is not None), None)
    if first is not None:
        raise own or OSError(*first)


def report_end(trainer: pl.Trainer, error: Exception) -> None:
    """Say in a line, on this rank, which one ends, where and why; one that has lost another says which, if it can.

    The others hear of it when this process has gone and their next exchange fails, at the latest after the timeout.

    Args:
        trainer: After it has given up.
        error: Why.
    """
    rank, ranks = trainer.global_rank, trainer.world_size
    place = f"rank {rank} of {ranks} ends at step {trainer.global_step}"
    words = f"{type(error).__name__}: {first_line(error)}"
    if not is_lost_connection(error):
        _leave_word(rank, words)
        logger.error("%s: %s", place, words)
        return
    last = _last_words(rank, ranks) or "the one that ended first says why above, or was killed"
    logger.error("%s, for it has lost another: %s (%s)", place, last, words)


def is_lost_connection(error: Exception) -> bool:
    """Whether an error is that of an exchange with a rank that is gone or does not answer."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _LOST)


def _store() -> Any | None:
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return _get_default_store() if initialized else None


def _key(rank: int) -> str:
    return f"kvtrain/ended/{rank}"


def _leave_word(rank: int, words: str) -> None:
    store = _store()
    if store is None:
        return
    try:
        store.set(_key(rank), words)
    except RuntimeError:  # whoever keeps it is gone already
        logger.debug("no word left for the other ranks", exc_info=True)


def _last_words(rank: int, ranks: int) -> str | None:
    """What ranks have left before they ended; rank 0 keeps them, unless a launcher does."""
    store = _store()
    if store is None:
        return None
    try:
        store.set_timeout(_WAIT)
        ended = [other for other in range(ranks) if other != rank and store.check([_key(other)])]
        return "; ".join(f"rank {other}, {store.get(_key(other)).decode()}" for other in ended)
    except RuntimeError:
        return "rank 0, which keeps what others say"
