"""Short runs of every training module, whose ``metrics.csv`` says the same however many processes share the rows.

A new architecture joins by a line in ``MODULES``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from kvtrain.losses.distillation import Distillation
from kvtrain.models.dmc import DMC
from kvtrain.models.duo import Duo
from kvtrain.models.full import Full
from kvtrain.models.host import retrofit
from kvtrain.models.method import Method
from kvtrain.training import DMCModule, DuoModule, LCKVModule, Phase, RetrofitModule, TransNormerModule
from kvtrain.training.csv_logger import CSVMetrics
from tests.distributed.runs import GATE_RATE, SHARING, Rows, trainer
from tests.hosts import VOCAB, make_host
from tests.training.tiny_runs import table

LOGGED_STEPS, ACCUMULATE = 20, 4
STOP_AT = 7  # a step between two that are logged
_LENGTHS = [24, 5, 3, 16, 2, 2, 9, 24, 7, 24, 4, 11]  # of rows: no micro-batch has as many targets as the next
_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "block_size": 5}
_SIZES |= {"hidden_dropout": 0.0}


def _on_host(
    base: type[RetrofitModule], method: Method, family: str = "llama", layers: int = 2, **settings: Any
) -> Any:
    """A module of this class on a host with random weights."""

    class Module(base):  # type: ignore[misc, valid-type]
        def host_config(self) -> Any:
            return make_host(family, layers=layers).config

        def _load_base(self) -> Any:
            return make_host(family, dtype=torch.float32, layers=layers)

        def build_model(self) -> Any:
            model = retrofit(self._load_base(), self.method)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.is_trainable(name))
            return model

    rate = GATE_RATE if base is DuoModule else 1e-3  # gates begin open, where they would stay
    return Module(base="unused", method=method, phases=[Phase("finetune", LOGGED_STEPS, rate)], seed=3, **settings)


MODULES: dict[str, Callable[[], Any]] = {
    "plain": lambda: _on_host(RetrofitModule, Full()),
    "distilled": lambda: _on_host(DMCModule, DMC(compression=2.0, window=4), distill=Distillation(0.5)),
    "dmc": lambda: _on_host(DMCModule, DMC(compression=2.0, window=4, init_bias=0.0)),
    "duo": lambda: _on_host(DuoModule, Duo(sink=1, recent=3), "qwen3"),
    "hard-concrete duo": lambda: _on_host(DuoModule, Duo(sink=1, recent=3, gates="hard_concrete", sparsity=0.5)),
    "lckv": lambda: _on_host(LCKVModule, SHARING, "qwen3", 5),
    "transnormer": lambda: TransNormerModule(_SIZES, phases=[Phase("all", LOGGED_STEPS, 1e-3)], seed=3),
}
# What they log beside the loss.
FIGURES = {
    "distilled": ["divergence", "cross_entropy", "compression"],
    "dmc": ["compression"],
    "duo": ["mean_gate"],
    "hard-concrete duo": ["mean_gate", "sparsity"],
}


class Stop(pl.Callback):
    """Tells every rank to stop, as ``trainer.max_time`` does."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == STOP_AT


def logged_run(
    folder: Path,
    name: str,
    rank: int = 0,
    world_size: int = 1,
    strategy: str | None = None,
    per_batch: int = 2,
    **settings: Any,
) -> list[dict[str, float]]:
    """The table of a run; eight rows a step, in as many micro-batches as these take ``per_batch`` rows at a time."""
    window = 2 * ACCUMULATE // per_batch
    settings = {"log_every_n_steps": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0, **settings}
    run = trainer(folder, world_size, strategy, LOGGED_STEPS, window, logger=CSVMetrics(str(folder)), **settings)
    rows = (_LENGTHS * LOGGED_STEPS)[: 2 * ACCUMULATE * LOGGED_STEPS]
    run.fit(MODULES[name](), Rows(rows, per_batch, window, rank, world_size))
    run.strategy.barrier()
    return table(folder / "metrics.csv")


def assert_same_figures(
    found: list[dict[str, float]], expected: list[dict[str, float]], name: str, rel: float = 1e-5, least: float = 1e-6
) -> None:
    """The same loss, and the same figures of its own, in every row; differences of larger numbers have ``least``."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for figure in ("loss", *FIGURES.get(name, [])):
            assert abs(ours[figure] - theirs[figure]) <= max(rel * abs(theirs[figure]), least), (
                name,
                figure,
                ours,
                theirs,
            )
