"""Pictures of a report in the loggers that a run has written to: Weights & Biases, and TensorBoard."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from kvtrain.errors import UsageError
from kvtrain.metrics import read_metrics

# Where the loggers of kvtrain.training.loggers leave what a run is known by.
_WANDB_ID, _TENSORBOARD = "wandb_id", "tensorboard"
Send = Callable[[Sequence[Path]], None]


def find_loggers(run: Path) -> list[Send]:
    """What sends pictures, PNG files, to each logger of a run, as they are named.

    Args:
        run: Run folder.

    Raises:
        UsageError: It has none, or the package of one is not installed.
    """
    found: list[Send] = []
    if (run / _WANDB_ID).is_file():
        _require("wandb")
        found.append(lambda pictures: _to_wandb(run, pictures))
    if (run / _TENSORBOARD).is_dir():
        _require("tensorboard")
        found.append(lambda pictures: _to_tensorboard(run, pictures))
    if not found:
        raise UsageError(f"{run}: the run has logged to neither wandb nor TensorBoard; set trainer.logger, or no --log")
    return found


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"--log: {package} is not installed: pip install 'kvtrain[{package}]'")


def _to_wandb(run: Path, pictures: Sequence[Path]) -> None:
    import wandb

    known = (run / _WANDB_ID).read_text(encoding="utf-8").strip()
    with wandb.init(
        id=known, resume="allow", dir=str(run), project=os.environ.get("WANDB_PROJECT", "kvtrain")
    ) as opened:
        opened.log({f"report/{path.stem}": wandb.Image(str(path)) for path in pictures})


def _to_tensorboard(run: Path, pictures: Sequence[Path]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    last = int(read_metrics(run)[-1]["step"])
    with SummaryWriter(str(run / _TENSORBOARD)) as writer:
        for path in pictures:
            pixels = np.round(imread(path)[..., :3] * 255).astype(np.uint8)  # (H, W, 3)
            writer.add_image(f"report/{path.stem}", pixels, last, dataformats="HWC")
