"""Checkpoints of DeepSpeed's ZeRO, read without DeepSpeed's own reader, which would run whatever pickles hold.

Every shard is read by torch's restricted unpickler, which is allowed three plain classes of DeepSpeed besides. Files
are mapped: what is not looked at is not read.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtrain.errors import first_line

CHECKPOINT_TAG = "checkpoint"  # the folder that DeepSpeed writes into, as Lightning calls it
_STATE = "optimizer_state_dict"
# Float32 masters, in which every rank has a part of every group (stage 2) or of every parameter (stage 3).
_MASTERS = {2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}


def is_zero(path: Path) -> bool:
    """Whether a checkpoint is DeepSpeed's."""
    return (path / CHECKPOINT_TAG).is_dir()


def read_shard(path: Path | str, map_location: Any = None, mmap: bool = False) -> Any:
    """One file of a checkpoint; no code in it is run.

    Raises:
        ValueError: It is damaged, or names anything but plain values; or DeepSpeed is not installed.
    """
    try:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs DeepSpeed: pip install kvtrain[deepspeed]") from error
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # pickle and zip readers raise a dozen unrelated types
        raise ValueError(f"{path}: not read, {_reason(error)}") from error


def _reason(error: Exception) -> str:
    words = str(error)
    if "Unsupported global: GLOBAL " in words:
        name = words.split("Unsupported global: GLOBAL ")[1].split()[0]
        return f"it names {name}, which no checkpoint of kvtrain needs"
    return first_line(error)


class ZeROCheckpoint:
    """Weights of a checkpoint by their names in the training module: masters where there are, in float32.

    Args:
        folder: The checkpoint.

    Raises:
        ValueError: It is damaged, or holds more than plain values.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / CHECKPOINT_TAG
        self.stage = 2 if (self.folder / "mp_rank_00_model_states.pt").is_file() else 3
        self.ranks = len(list(self.folder.glob("*zero_pp_rank_*_optim_states.pt")))
        if not self.ranks:
            raise ValueError(f"{folder}: damaged, no file of it holds optimizer states")

    def require_whole(self) -> None:
        """Make sure that no rank's file is missing, and that all of them open; what they hold is not read.

        Raises:
            ValueError: One is damaged.
        """
        written = self.model_states[0].get("dp_world_size", self.ranks)
        if written != self.ranks or len(self._masters) != written:
            raise ValueError(f"{self.folder.parent}: damaged, optimizer states of {self.ranks} ranks of {written}")

    @cached_property
    def model_states(self) -> list[dict[str, Any]]:
        """What is no optimizer state: of the first rank under stage 2, of every rank under stage 3."""
        ranks = range(self.ranks) if self.stage == 3 else [0]
        name = "zero_pp_rank_{}_mp_rank_00_model_states.pt" if self.stage == 3 else "mp_rank_00_model_states.pt"
        return [read_shard(self.folder / name.format(rank), "cpu", mmap=True) for rank in ranks]

    @cached_property
    def _masters(self) -> list[list[Tensor]]:
        """By rank, the flat tensors of its groups."""
        masters = []
        for rank in range(self.ranks):
            (file,) = self.folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            masters.append(read_shard(file, "cpu", mmap=True)[_STATE][_MASTERS[self.stage]])
        return masters

    @cached_property
    def _paddings(self) -> list[list[int]] | None:
        """Numbers between parameters of each group, where stage 2 aligns them."""
        (file,) = self.folder.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")
        paddings: list[list[int]] | None = read_shard(file, "cpu", mmap=True)[_STATE].get("param_alignment_paddings")
        return paddings

    @cached_property
    def _places(self) -> dict[str, tuple[int, int, torch.Size]]:
        """Of every trained parameter: its group, where it begins in the flat tensors, and its shape."""
        places: dict[str, tuple[int, int, torch.Size]] = {}
        offset = 0
        for group, shapes in enumerate(self.model_states[0]["param_shapes"]):
            offset = offset if self.stage == 3 else 0  # whose groups are cut anew, and follow each other
            for index, (name, shape) in enumerate(shapes.items()):
                places[name] = (group, offset, torch.Size(shape))
                offset += self._stretch(shape)
                if self.stage == 2 and self._paddings is not None:
                    offset += self._paddings[group][index]
        return places

    def _stretch(self, shape: torch.Size) -> int:
        """Numbers that a parameter takes in a flat tensor."""
        numel = math.prod(shape)
        return math.ceil(numel / self.ranks) if self.stage == 3 else numel

    @property
    def frozen(self) -> Mapping[str, torch.Size]:
        """Shapes of the parameters that do not train."""
        return self.model_states[0].get("frozen_param_shapes") or {}

    @property
    def trained(self) -> list[str]:
        """Names of the parameters that train."""
        return list(self._places)

    def names(self) -> list[str]:
        """Names of all parameters and buffers."""
        return [*self.trained, *self.frozen, *self.model_states[0]["buffer_names"]]

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        if name in self._places:
            return self._read_master(name).detach()
        if name in self.frozen:
            shape = self.frozen[name]
            fragments = [states["frozen_param_fragments"][name].flatten() for states in self.model_states]
            return torch.cat(fragments)[: math.prod(shape)].view(shape)
        buffer: Tensor = self.model_states[0]["module"][name]
        return buffer

    def _read_master(self, name: str) -> Tensor:
        group, start, shape = self._places[name]
        length = self._stretch(shape)
        if self.stage == 2:
            return _stretch_of([groups[group] for groups in self._masters], start, length).view(shape)
        parts = [_stretch_of(groups, start, length) for groups in self._masters]
        return torch.cat(parts)[: math.prod(shape)].view(shape)


def _stretch_of(pieces: list[Tensor], start: int, length: int) -> Tensor:
    """``pieces[start : start + length]``, were they one tensor; a view where one piece has it all."""
    found, end = [], start + length
    for piece in pieces:
        if start < piece.numel() and end > 0:
            found.append(piece[max(start, 0) : end])
        start, end = start - piece.numel(), end - piece.numel()
    return found[0] if len(found) == 1 else torch.cat(found)
