"""Trainings that must end alike under every strategy and on any number of processes; an architecture joins by a line.

All begin from a base on disk, as users' trainings do, and read packed rows of several documents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from kvtrain.data.loader import PackedLoader
from kvtrain.data.module import data_place
from kvtrain.data.packing import PackedRows
from kvtrain.data.shards import TokenShards
from kvtrain.losses.distillation import Distillation
from kvtrain.models.adapters import LoRA
from kvtrain.models.dmc import DMC
from kvtrain.models.dms import DMS
from kvtrain.models.duo import Duo
from kvtrain.models.hybrid import Hybrid
from kvtrain.models.lckv import LCKV
from kvtrain.training import (
    DMCModule,
    DMSModule,
    DuoModule,
    HybridModule,
    HybridPretrainModule,
    LCKVModule,
    LCKVPretrainModule,
    Phase,
    RetrofitModule,
    TransNormerMaskedModule,
    TransNormerModule,
)
from kvtrain.training.parameters import whole
from kvtrain.training.strategies import FSDP2, DeepSpeedZeRO
from kvtrain.training.strategies.base import traits
from kvtrain.training.trainer import KVTrainer
from tests.distributed.runs import SHARING, zero_config
from tests.hosts import VOCAB, make_host
from tests.training.tiny_runs import LENGTH, RowsData, make_rows

FSDP2_SETTINGS = {
    "hsdp": {"data_parallel_replicate_size": 2},
    "context": {"context_parallel": 2},
    "hsdp, context": {"data_parallel_replicate_size": 2, "context_parallel": 2},
}
ROWS_A_BATCH = 4  # over all processes
WINDOW = 2
VALIDATED_EVERY = 3  # steps; the others between have no held-out figures
STATE = {
    "variant": "T1",
    "hidden_dropout": 0.0,
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}

# The divergence alone is 0 at first, and its gradient rounding, of which AdamW would make whole steps.
MIXED = Distillation(weight=0.5)
ONE = [Phase("all", 20, 1e-3)]
ADAPTERS = LoRA(rank=2, alpha=4.0)
# The first boundary clears the borrowed rows, and each the optimizer.
BOUNDARY = 3
DMC_PHASES = [Phase("zero_out", BOUNDARY, 5e-4), Phase("retrofit", 10, 5e-4), Phase("finetune", 7, 5e-4)]


class PlainSGD(RetrofitModule):
    """Steps as large as the gradient is, which AdamW's are not."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.05)


@dataclass(frozen=True)
class Training:
    """One line of the table.

    Attributes:
        make: The module, of the folder of its base.
        host: How the base is made.
        by_batches: Whether its loss is one of a batch as a whole: one process then has batches as small as a rank's.
        needs_whole_rows: The words by which it refuses to let ranks share rows.
    """

    make: Callable[[str], Any]
    host: dict[str, Any] = field(default_factory=dict)
    needs_whole_rows: str = ""
    by_batches: bool = False


QWEN = {"family": "qwen3"}
TRAININGS: dict[str, Training] = {
    "plain": Training(lambda base: RetrofitModule(base, phases=ONE), {**QWEN, "tie_word_embeddings": True}),
    "windows and frequencies by type of layer": Training(
        lambda base: DMCModule(base, DMC(compression=2.0, window=4), phases=DMC_PHASES),
        {"family": "gemma3_sliding", "layers": 3},
    ),
    "sgd": Training(lambda base: PlainSGD(base, phases=ONE)),
    "dmc": Training(
        lambda base: DMCModule(
            base, DMC(compression=2.0, window=4), phases=DMC_PHASES, distill=MIXED, activation_checkpointing=True
        )
    ),
    "dmc, merging": Training(
        lambda base: DMCModule(
            base, DMC(compression=4.0, window=4, init_bias=0.0), phases=[Phase("finetune", 20, 5e-4)]
        )
    ),
    "converted": Training(
        lambda base: DMCModule(base, DMC(compression=2.0, window=4), phases=DMC_PHASES, num_key_value_heads=1),
        needs_whole_rows="context_parallel is 2, and the model has 1 key-value heads",
    ),
    "dmc, adapters": Training(
        lambda base: DMCModule(base, DMC(compression=2.0, window=4), phases=DMC_PHASES, distill=MIXED, lora=ADAPTERS)
    ),
    "experts": Training(
        lambda base: DMCModule(
            base, DMC(compression=2.0, window=4), phases=DMC_PHASES, distill=MIXED, activation_checkpointing=True
        ),
        {"family": "qwen3_moe"},
        needs_whole_rows="this host's own losses are means over whole batches; set context_parallel to 1",
        by_batches=True,
    ),
    "dms": Training(
        lambda base: DMSModule(
            base,
            DMS(compression=4.0, window=3, init_bias=1.0),
            phases=[Phase("retrofit", BOUNDARY, 5e-4), Phase("finetune", 17, 5e-4)],
            activation_checkpointing=True,
        ),
        QWEN,
    ),
    "dms, adapters": Training(
        lambda base: DMSModule(
            base, DMS(compression=4.0, window=3, init_bias=1.0), phases=[Phase("finetune", 20, 5e-4)], lora=ADAPTERS
        ),
        QWEN,
    ),
    "duo": Training(
        lambda base: DuoModule(base, Duo(sink=1, recent=3), phases=[Phase("gates", 20, 0.5)], regularization=0.2),
        {**QWEN, "layers": 3},
    ),
    "duo, teacher's attention": Training(
        lambda base: DuoModule(base, Duo(sink=1, recent=3, mixing="teacher"), phases=[Phase("gates", 20, 0.5)]),
        {**QWEN, "layers": 3},
    ),
    "duo, hard-concrete": Training(
        lambda base: DuoModule(base, Duo(sink=1, recent=3, gates="hard_concrete", sparsity=0.5), phases=ONE),
        {**QWEN, "layers": 3},
    ),
    "hybrid": Training(
        lambda base: HybridModule(
            base,
            Hybrid(linear_layers=[0, 2]),
            phases=[Phase("match", BOUNDARY, 5e-4), Phase("distill", 17, 5e-4)],
            distill=MIXED,
            activation_checkpointing=True,
        ),
        {**QWEN, "layers": 3},
        needs_whole_rows="the phase match needs whole rows; set context_parallel to 1",
        by_batches=True,
    ),
    "hybrid from nothing": Training(
        lambda base: HybridPretrainModule(f"{base}/config.json", phases=ONE), {**QWEN, "layers": 3}
    ),
    "lckv": Training(
        lambda base: LCKVModule(base, SHARING, phases=ONE, activation_checkpointing=True), {**QWEN, "layers": 5}
    ),
    "lckv, averaged": Training(
        lambda base: LCKVModule(base, LCKV(kv_map="0_1_1_1_4", init="mean", residual=True), phases=ONE),
        {**QWEN, "layers": 5},
    ),
    "lckv, adapters": Training(
        lambda base: LCKVModule(base, LCKV(kv_map="cla2"), phases=ONE, distill=MIXED, lora=ADAPTERS),
        {**QWEN, "layers": 4},
    ),
    "lckv from nothing": Training(
        lambda base: LCKVPretrainModule(f"{base}/config.json", SHARING, phases=ONE), {**QWEN, "layers": 5}
    ),
    "transnormer": Training(
        lambda _: TransNormerModule({**STATE, "block_size": 5}, phases=ONE),
        needs_whole_rows="TransNormerModule trains on whole rows alone",
    ),
    "masked transnormer": Training(
        lambda _: TransNormerMaskedModule({**STATE, "causal": False}, phases=ONE),
        needs_whole_rows="TransNormerMaskedModule trains on whole rows alone",
    ),
}


def write_place(folder: Path) -> None:
    """The base of every training, in several files of weights, and the rows that all read."""
    for name, training in TRAININGS.items():
        make_host(dtype=torch.float32, **training.host).save_pretrained(folder / name, max_shard_size="20KB")
    (folder / "rows").mkdir()
    make_rows(folder / "rows")


class SharedRows(RowsData):
    """The same rows a step on any number of processes; ``batch_size`` of them a batch, over all processes."""

    def __init__(self, rows: PackedRows, batch_size: int) -> None:
        super().__init__(rows)
        self.batch_size = batch_size

    def loader(self, seed: int | None, **settings: Any) -> PackedLoader:
        place = data_place(self.trainer)
        return PackedLoader(self.rows, self.batch_size // place["world_size"], seed=seed, **place, **settings)


class Notes(pl.Callback):
    """What a run says of every step, as far as it is of all ranks."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.held_out: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self.losses.append(float(trainer.callback_metrics["loss"]))
        norm = traits(trainer).last_gradient_norm()
        self.norms.append(float(trainer.callback_metrics["gradient_norm"] if norm is None else norm))

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.held_out.append(float(trainer.callback_metrics["val_loss"]))


def strategy_of(name: str) -> Any:
    """By its word; small parameters are partitioned under ZeRO-3, too, HSDP keeps two copies, and two share rows."""
    if name == "zero3":
        return DeepSpeedZeRO(zero_config(3, keep_whole=1))
    return FSDP2(**FSDP2_SETTINGS[name]) if name in FSDP2_SETTINGS else name


def train(
    name: str,
    place: Path,
    strategy: str = "auto",
    world_size: int = 1,
    steps: int = 20,
    window: int = WINDOW,
    resume: str | None = None,
    run: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Train, or go on, and tell where it ended.

    Args:
        name: In the table.
        place: With the bases; holds the runs, too.
        strategy: Its word.
        world_size: Processes, of which this is one.
        steps: In all.
        window: Micro-batches of a step.
        resume: A checkpoint; ``{place}`` in it stands for that.
        run: Name of the run folder; without one nothing is saved.
        **settings: Of the trainer.
    """
    pl.seed_everything(0, verbose=False)
    batch_size = ROWS_A_BATCH
    if TRAININGS[name].by_batches and world_size == 1:
        batch_size, window = batch_size // 2, window * 2
    module, notes = TRAININGS[name].make(str(place / name)), Notes()
    saves = {"checkpoint_every": 3} if run else {"enable_checkpointing": False}
    trainer = KVTrainer(
        default_root_dir=str(place / (run or "unsaved")),
        strategy=strategy_of(strategy),
        accelerator="cpu",
        devices=world_size,
        max_steps=steps,
        accumulate_grad_batches=window,
        val_check_interval=VALIDATED_EVERY * window,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=2 * ROWS_A_BATCH // batch_size,
        callbacks=[notes],
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        **{"gradient_clip_val": 0.5, **saves, **settings},
    )
    trainer.fit(
        module,
        SharedRows(PackedRows(TokenShards(place / "rows"), LENGTH), batch_size),
        ckpt_path=resume and resume.format(place=place),
        weights_only=True,
    )
    weights = {parameter: whole(tensor) for parameter, tensor in module.named_parameters()}
    found = {"weights": weights, "losses": notes.losses, "norms": notes.norms, "held_out": notes.held_out}
    return found | {"waits": waits(trainer.strategy)} if strategy in FSDP2_SETTINGS else found


def waits(strategy: Any) -> list[float]:
    """Minutes that the groups of a strategy's ranks wait for each other."""
    groups = strategy.device_mesh.get_all_groups()
    groups += [strategy.parallel.group] if strategy.parallel.size > 1 else []
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60 for group in groups]


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """The same weights, logged losses, gradient norms and held-out losses, as far as sums in another order allow.

    Weights are compared as one vector: AdamW makes whole steps of a gradient that is nothing but rounding.
    """
    ours, theirs = found["weights"], expected["weights"]
    assert ours.keys() == theirs.keys()
    astray = torch.cat([(ours[name] - weight).flatten() for name, weight in theirs.items()]).norm()
    assert astray < tolerance * torch.cat([weight.flatten() for weight in theirs.values()]).norm()
    torch.testing.assert_close(found["losses"], expected["losses"], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(found["norms"], expected["norms"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found["held_out"], expected["held_out"], atol=2e-6, rtol=1e-6)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same weights, bit for bit."""
    assert found.keys() == expected.keys()
    assert [name for name, weight in expected.items() if not torch.equal(found[name], weight)] == []
