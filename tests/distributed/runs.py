"""Tiny runs that must end alike: plain Lightning in one process, DDP and DeepSpeed in several."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvtrain.data.packing import IGNORE_INDEX, Batch
from kvtrain.models.dmc import DMC
from kvtrain.models.duo import Duo
from kvtrain.models.duo.convert import gated_attention
from kvtrain.models.full import Full
from kvtrain.models.host import retrofit
from kvtrain.models.lckv import LCKV
from kvtrain.training import DMCModule, DuoModule, LCKVModule, Phase, RetrofitModule
from kvtrain.training.parameters import whole
from kvtrain.training.strategies import DeepSpeedZeRO
from kvtrain.training.trainer import KVTrainer
from tests.hosts import make_host, random_ids

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 24
LEARNING_RATE = 0.05
PHASES = [
    Phase("zero_out", 3, 1e-3),
    Phase("retrofit", 4, 1e-3),
    Phase("finetune", 3, 1e-3, final_learning_rate=1e-4),
]
STEPS = sum(phase.steps for phase in PHASES)
# Layers 1 and 2 read layer 3, which makes its keys and values alone in all passes but the last; layer 4 reads it too.
SHARING = LCKV(kv_map="0_3_3_3_3", forward_passes=1, backward_passes=3, prefill_block=8)
LCKV_STEPS = 6
GATE_STEPS, GATE_RATE = 8, 0.5


class Rows:
    """A sized loader of given rows: ``per_batch`` a micro-batch over all ranks, ``window`` micro-batches a step."""

    def __init__(self, lengths: list[int], per_batch: int, window: int, rank: int = 0, world_size: int = 1) -> None:
        self.lengths, self.per_batch, self.window = lengths, per_batch, window
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.lengths) // self.per_batch

    def __iter__(self):
        ids = random_ids(len(self.lengths), LENGTH)
        for index in range(len(self)):
            everyone = range(index * self.per_batch, (index + 1) * self.per_batch)
            mine = list(everyone)[self.rank :: self.world_size]
            first = (index - index % self.window) * self.per_batch
            step = self.lengths[first : first + self.window * self.per_batch]
            yield self._batch(ids, mine) | {"num_items": torch.tensor(sum(length - 1 for length in step))}

    def _batch(self, ids: Tensor, rows: list[int]) -> Batch:
        place = torch.arange(LENGTH).expand(len(rows), -1)
        real = place < torch.tensor([self.lengths[row] for row in rows])[:, None]
        labels = torch.where(real & (place > 0), ids[rows], IGNORE_INDEX)
        return {
            "input_ids": ids[rows] * real,
            "position_ids": place * real,
            "document_ids": real.long(),
            "labels": labels,
            "row_ids": torch.tensor(rows),
        }


class _FromMemory:
    """A training whose model is made by ``build_model`` alone: there are no files to read parts of."""

    def pretrained_weights(self) -> None:
        return None


class TinyDMC(_FromMemory, DMCModule):
    """Notes what its parameters and its optimizer hold around the boundaries."""

    def __init__(self, family: str = "llama") -> None:
        super().__init__("unused", DMC(compression=2.0, window=4), phases=PHASES, seed=3, activation_checkpointing=True)
        self.family = family
        self.notes: list[dict[str, Any]] = []

    def build_model(self) -> nn.Module:
        return retrofit(make_host(self.family, dtype=torch.float32), self.method)

    def begin_phase(self, phase: Phase) -> None:
        before = moments(self)
        super().begin_phase(phase)
        self.notes.append({"before": before, "after": moments(self), "rows": borrowed(self)})


class TinyLCKV(_FromMemory, LCKVModule):
    """Runs layers again and again, with gradient and without, under activation checkpointing."""

    def __init__(self) -> None:
        phases = [Phase("train", LCKV_STEPS, 1e-3)]
        super().__init__("unused", SHARING, phases=phases, seed=3, activation_checkpointing=True)
        self.held_out: list[dict[str, float]] = []

    def host_config(self) -> PreTrainedConfig:
        return make_host("qwen3", layers=5).config

    def build_model(self) -> nn.Module:
        return retrofit(make_host("qwen3", dtype=torch.float32, layers=5), self.method)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        logged = self.trainer.callback_metrics
        self.held_out.append({name: logged[name].item() for name in ("val_loss", "val_serving_gap")})


class TinyDuo(_FromMemory, DuoModule):
    """Gates that take large steps, and notes of what bringing them back between 0 and 1 does to them."""

    def __init__(self) -> None:
        phases, method = [Phase("gates", GATE_STEPS, GATE_RATE)], Duo(sink=1, recent=3)
        told = {"regularization": 0.2, "seed": 3, "activation_checkpointing": True}
        super().__init__("unused", method, phases=phases, **told)
        self.clamped: list[dict[str, Tensor]] = []

    def build_model(self) -> nn.Module:
        model = retrofit(make_host("qwen3", dtype=torch.float32, layers=3), self.method)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.is_trainable(name))
        return model

    def stored(self, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Gates of all layers, or what else can be read of them."""
        return torch.stack([read(module.gates).detach().clone() for module in gated_attention(self.model)])

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        before = self.stored(whole)
        super().on_train_batch_start(batch, batch_idx)
        self.clamped.append({"before": before, "after": self.stored(whole), "masters": self.stored(masters)})


class TinySGD(_FromMemory, RetrofitModule):
    """One plain host under SGD, whose steps show the size of the gradient."""

    def __init__(self) -> None:
        super().__init__("unused", Full(), phases=[Phase("all", 1, LEARNING_RATE)])

    def build_model(self) -> nn.Module:
        return retrofit(make_host(dtype=torch.float32), self.method)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)


def gathered(parameters: list[nn.Parameter]) -> Any:
    """A context in which the parameters of any strategy are whole."""
    if not hasattr(parameters[0], "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def masters(parameter: nn.Parameter) -> Tensor:
    """The float32 copy that the optimizer steps."""
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        return parameter
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def weights(module: Any) -> dict[str, Tensor]:
    """Whole parameters, copied."""
    named = dict(module.model.named_parameters())
    with gathered(list(named.values())):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def moments(module: Any) -> dict[str, float]:
    """The largest number of each kind in the optimizer's state of this rank."""
    (optimizer,) = module.trainer.optimizers
    largest: dict[str, float] = {}
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        for name, value in state.items():
            largest[name] = max(largest.get(name, 0.0), value.abs().max().item())
    return largest


def borrowed(module: Any) -> float:
    """The largest borrowed number, in the parameters and in their masters."""
    found = []
    for name, parameter in module.model.named_parameters():
        if ".q_proj." in name or ".k_proj." in name:
            head_dim = module.model.config.host_config.head_dim
            with gathered([parameter]):
                found.append(parameter[head_dim - 1 :: head_dim].abs().max().item())
            found.append(masters(parameter)[head_dim - 1 :: head_dim].abs().max().item())
    return max(found)


def trainer(
    folder: Path, world_size: int, stage: int | str | DeepSpeedZeRO | None, steps: int, window: int, **settings: Any
) -> KVTrainer:
    """Plain Lightning, one of its strategies by name, or ZeRO, by stage from the shipped configuration."""
    return KVTrainer(
        default_root_dir=str(folder),
        strategy=DeepSpeedZeRO(zero_config(stage)) if isinstance(stage, int) else stage or "auto",
        accelerator="cpu",
        devices=world_size,
        max_steps=steps,
        accumulate_grad_batches=window,
        enable_progress_bar=False,
        **{"logger": False, **settings},
    )


def zero_config(stage: int, keep_whole: int = 100) -> dict[str, Any]:
    """The shipped one; under stage 3 matrices are partitioned, which are small enough here to be kept whole.

    Args:
        stage: 2 or 3.
        keep_whole: Parameters of fewer numbers are not partitioned.
    """
    config: dict[str, Any] = json.loads((ROOT / f"configs/deepspeed/zero{stage}.json").read_text())
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = keep_whole
    return config


def sgd_step(folder: Path, rank: int, world_size: int, stage: int | None, clip: float | None) -> dict[str, Any]:
    """One SGD step over four micro-batches of ragged rows."""
    module = TinySGD()
    run = trainer(folder, world_size, stage, 1, 4, gradient_clip_val=clip, enable_checkpointing=False)
    run.fit(module, Rows([24, 5, 3, 16, 2, 2, 9, 24], 2, 4, rank, world_size))
    return weights(module)


def dmc_run(
    folder: Path, rank: int, world_size: int, stage: int | None, family: str = "llama", **settings: Any
) -> dict[str, Any]:
    """Three phases; rows of one length, because the compression loss is a mean over the rows of a batch."""
    module = TinyDMC(family)
    run = trainer(folder, world_size, stage, STEPS, 2, gradient_clip_val=1.0, **settings)
    run.fit(module, Rows([LENGTH] * 4 * STEPS, 2, 2, rank, world_size))
    frequencies = module.model.model.rotary_emb.inv_freq.dtype
    return {"notes": module.notes, "weights": weights(module), "frequencies": frequencies}


def lckv_run(folder: Path, rank: int, world_size: int, stage: int | str | None) -> dict[str, Any]:
    """Ragged rows; held-out ones begin with one of nothing but padding, which a second rank has to itself."""
    module = TinyLCKV()
    look = {"val_check_interval": 6, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    run = trainer(folder, world_size, stage, LCKV_STEPS, 2, gradient_clip_val=1.0, enable_checkpointing=False, **look)
    place = {"rank": rank, "world_size": world_size}
    lengths = ([24, 5, 3, 16, 2, 2, 9, 24] * LCKV_STEPS)[: 4 * LCKV_STEPS]
    run.fit(module, Rows(lengths, 2, 2, **place), Rows([24, 0, 17, 20], 2, 2, **place))
    return {"weights": weights(module), "held_out": module.held_out}


def duo_run(folder: Path, rank: int, world_size: int, stage: int | str | None) -> dict[str, Any]:
    """Ragged rows. Under stage 3 even gates are partitioned, which as a rule are small enough to be kept whole."""
    module, place = TinyDuo(), {"rank": rank, "world_size": world_size}
    strategy = stage if stage != 3 else DeepSpeedZeRO(zero_config(3, keep_whole=1))
    look = {"val_check_interval": 8, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    run = trainer(folder, world_size, strategy, GATE_STEPS, 2, enable_checkpointing=False, **look)
    rows = Rows([24, 5, 3, 16, 2, 2, 9, 24] * (GATE_STEPS // 2), 2, 2, **place)
    run.fit(module, rows, Rows([24, 9, 17, 20], 2, 2, **place))
    held_out = run.callback_metrics["val_loss"].item()
    return {"weights": weights(module), "clamped": module.clamped, "held_out": held_out}


def assert_same_gates(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same gates and the same held-out loss; steps that leave the range are taken back, in the masters too."""
    start = dict(TinyDuo().build_model().named_parameters())
    for name, weight in expected["weights"].items():
        astray, way = (found["weights"][name] - weight).norm(), (weight - start[name]).norm()
        assert astray < 1e-3 * way if name.endswith(".gates") else astray == way == 0, f"{name}: {astray} on {way}"
    assert abs(found["held_out"] - expected["held_out"]) < 2e-6
    beyond = [note["before"] for note in found["clamped"] if note["before"].min() < -0.01]
    assert beyond and not all((gates < 0).all() for gates in beyond)
    for ours, theirs in zip(found["clamped"], expected["clamped"], strict=True):
        torch.testing.assert_close(ours["before"], theirs["before"], atol=1e-4, rtol=0)
        assert torch.equal(ours["after"], ours["masters"])
        starts_step = not torch.equal(ours["after"], ours["before"])
        assert not starts_step or torch.equal(ours["after"], ours["before"].clamp(0.0, 1.0))


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same weights and the same held-out figures, as far as sums in another order allow."""
    start = dict(TinyLCKV().build_model().named_parameters())
    assert found["weights"].keys() == expected["weights"].keys() == start.keys()
    for name, weight in expected["weights"].items():
        astray, way = (found["weights"][name] - weight).norm(), (weight - start[name]).norm()
        assert astray < 1e-3 * way, f"{name}: {astray} on a way of {way}"
    assert len(found["held_out"]) == len(expected["held_out"]) == 2
    for ours, theirs in zip(found["held_out"], expected["held_out"], strict=True):
        assert abs(theirs["val_serving_gap"]) > 1e-5  # passes too few for the two forms to agree
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
