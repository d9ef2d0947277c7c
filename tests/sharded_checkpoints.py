"""Checkpoints in pieces, as torch and DeepSpeed write them, made of a state dict without training."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtrain.training.strategies.sharded_state import save_sharded


def write_sharded(folder: Path, state: dict[str, Tensor], **rest: Any) -> None:
    """By torch, one rank."""
    save_sharded({"state_dict": state, "optimizer_states": [], **rest}, folder, first=True)


def write_zero(folder: Path, state: dict[str, Tensor], stage: int, ranks: int, frozen: int = 0, **rest: Any) -> None:
    """By DeepSpeed, in two groups, the second of one parameter; the first ``frozen`` parameters do not train."""
    (folder / "checkpoint").mkdir(parents=True)
    fixed, trained = dict(list(state.items())[:frozen]), dict(list(state.items())[frozen:])
    names = list(trained)
    groups = [{name: trained[name] for name in part} for part in (names[:-1], names[-1:])]
    common = {
        "param_shapes": [{name: tensor.shape for name, tensor in group.items()} for group in groups],
        "frozen_param_shapes": {name: tensor.shape for name, tensor in fixed.items()},
        "buffer_names": [],
        **rest,
    }
    for rank in range(ranks):
        part = fixed if stage == 2 else {name: _parts(tensor, ranks)[rank] for name, tensor in fixed.items()}
        if stage == 3 or rank == 0:
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            torch.save({**common, "frozen_param_fragments": part, "module": {}}, folder / "checkpoint" / name)
        masters = _masters_2(groups, ranks, rank) if stage == 2 else _masters_3(groups, ranks, rank)
        optimizer = {"optimizer_state_dict": {"zero_stage": stage, **masters}}
        torch.save(optimizer, folder / "checkpoint" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def _parts(tensor: Tensor, ranks: int) -> list[Tensor]:
    """Equal stretches of a flattened tensor, the last ones padded."""
    size = math.ceil(tensor.numel() / ranks)
    flat = torch.nn.functional.pad(tensor.flatten(), (0, size * ranks - tensor.numel()), value=torch.nan)
    return [part.clone() for part in flat.split(size)]


def _masters_2(groups: list[dict[str, Tensor]], ranks: int, rank: int) -> dict[str, Any]:
    """Parameters of a group one after the other, three numbers between them, cut into equal stretches."""
    padding = torch.full((3,), torch.nan)
    flat = [torch.cat([part for tensor in group.values() for part in (tensor.flatten(), padding)]) for group in groups]
    return {
        "single_partition_of_fp32_groups": [_parts(tensor, ranks)[rank] for tensor in flat],
        "param_alignment_paddings": [[3] * len(group) for group in groups],
    }


def _masters_3(groups: list[dict[str, Tensor]], ranks: int, rank: int) -> dict[str, Any]:
    """A rank's stretch of every parameter one after the other, cut where no parameter ends."""
    flat = torch.cat([_parts(tensor, ranks)[rank] for group in groups for tensor in group.values()])
    cut = len(flat) // 3
    return {"fp32_flat_groups": [flat[:cut].clone(), flat[cut:].clone()]}
