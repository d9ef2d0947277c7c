"""What ``--ckpt_path`` means for a run that goes on."""

import logging
from pathlib import Path

from kvtrain import run_folder
from kvtrain.models.checkpoint import read_checkpoint
from kvtrain.models.sharded import ShardedReader, is_sharded
from kvtrain.models.zero import ZeROCheckpoint, is_zero
from kvtrain.training.strategies import DEEPSPEED_INSTALLED

logger = logging.getLogger("kvtrain")


def find_checkpoint(run: Path, asked: str | None) -> run_folder.Found:
    """The checkpoint to go on from: a path is taken by its word, ``last`` passes over what is damaged and says so.

    A job that its scheduler starts again finds nobody to answer it: it goes on as far back as it must. It begins anew
    only where nothing was ever saved.

    Args:
        run: The run folder.
        asked: ``last``, ``best``, a path, or None for a run that begins.

    Raises:
        ValueError: No such checkpoint, or it is damaged; or ``last`` finds none that is whole.
    """
    if asked != "last":
        path = run_folder.resolve_checkpoint(run, asked) if asked else None
        if path:
            require_readable(path)
        return run_folder.Found(path, {})
    found = run_folder.find_last(run, require_readable)
    for path, fault in found.faults.items():
        logger.warning("%s; it will be kept as %s%s", fault, path.name, run_folder.DAMAGED)
    if found.faults:
        logger.warning("going on from %s, the newest checkpoint that is whole", found.path)
    if found.path is None:
        logger.info("%s has no checkpoint yet: starting from the beginning", run)
    return found


def require_readable(path: Path) -> None:
    """Make sure that a checkpoint opens, one of DeepSpeed's where that is installed.

    Raises:
        ValueError: It does not.
    """
    if path.is_file():
        read_checkpoint(path)
    elif is_sharded(path):
        ShardedReader(path).rest()
    elif is_zero(path) and DEEPSPEED_INSTALLED:
        ZeROCheckpoint(path).require_whole()
