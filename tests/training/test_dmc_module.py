"""DMC's phases: what each step is told, what happens at a boundary, and that accumulation is exact."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from kvtrain.export.hf import export_run
from kvtrain.models.dmc import DMC
from kvtrain.models.gating import borrowed_parameters
from kvtrain.training import DMCModule, Phase, RetrofitModule
from tests.hosts import make_host

from .tiny_runs import make_rows


def phases(zero_out=10, retrofit=20, finetune=5):
    counts = {"zero_out": zero_out, "retrofit": retrofit, "finetune": finetune}
    return [Phase(name, steps, 1e-2) for name, steps in counts.items() if steps]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random host on disk."""
    folder = tmp_path_factory.mktemp("base")
    make_host("llama", dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Ragged packed rows: documents of random lengths."""
    return make_rows(tmp_path_factory.mktemp("shards"))


class RowsData(pl.LightningDataModule):
    """Serves given rows, shuffled, with the window that the trainer asks for."""

    def __init__(self, rows, batch_size):
        super().__init__()
        self.rows, self.batch_size, self.tokenizer_name = rows, batch_size, None

    def train_dataloader(self):
        from kvtrain.data.loader import PackedLoader

        return PackedLoader(self.rows, self.batch_size, seed=0, window=self.trainer.accumulate_grad_batches)

    val_dataloader = train_dataloader


def train(module, rows, folder, steps, batch_size=4, accumulate=1, **settings):
    trainer = pl.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(module, RowsData(rows, batch_size))
    return trainer


def test_schedules(base):
    """Linear in the compression, not in the kept fraction; the channel is gone at 80 %."""
    module = DMCModule(base, DMC(compression=5.0), phases=phases())
    targets = [module.target(module.schedule.phase_step(step)) for step in range(35)]
    assert targets[:10] == [1.0] * 10
    assert targets[10] == pytest.approx(1.2) and targets[29] == pytest.approx(5.0)
    assert targets == sorted(targets)
    assert targets[30:] == [5.0] * 5
    scales = [module.channel_scale(module.schedule.phase_step(step)) for step in range(35)]
    assert scales[0] == 1.0 and scales[4] == pytest.approx(0.5) and scales[8:10] == [0.0, 0.0]
    assert scales[10:] == [None] * 25


def test_phases_must_be_dmcs(base):
    with pytest.raises(ValueError, match="zero_out, retrofit, finetune"):
        DMCModule(base, phases=[Phase("warmup", 5, 1e-3)])
    with pytest.raises(ValueError, match="in that order"):
        DMCModule(base, phases=[Phase("retrofit", 5, 1e-3), Phase("zero_out", 5, 1e-3)])
    with pytest.raises(ValueError, match="at least one phase"):
        DMCModule(base, phases=[])


def test_learning_rate_curves():
    phase = Phase("x", 11, 1.0, final_learning_rate=0.1, warmup_steps=2)
    rates = [phase.learning_rate_at(step) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.1) and rates[2:] == sorted(rates[2:], reverse=True)
    assert Phase("x", 3, 0.2).learning_rate_at(2) == 0.2


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": 0.0}, {"warmup_steps": 4}])
def test_phases_are_validated(wrong):
    with pytest.raises(ValueError, match="phase 'x'"):
        Phase(**{"name": "x", "steps": 4, "learning_rate": 1e-3, **wrong})


def test_boundary_clears_rows_and_moments(base, rows, tmp_path):
    """Right after zero-out the borrowed rows are zero and AdamW counts from one again."""
    seen = {}

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            attention = module.model.model.layers[0].self_attn
            borrowed = torch.cat([attention.q_proj.weight[7::8], attention.k_proj.weight[7::8]])
            state = optimizer.state.get(attention.o_proj.weight, {})
            seen[trainer.global_step] = (borrowed.abs().max().item(), float(state.get("step", 0)))

    module = DMCModule(base, DMC(compression=2.0), phases=phases(4, 4, 2), seed=3)
    train(module, rows, tmp_path, 10, callbacks=[Watch()])
    assert [seen[step][1] for step in range(10)] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert seen[3][0] > 0 and seen[4][0] == 0.0 and seen[5][0] > 0
    assert seen[8][0] > 0


@pytest.mark.parametrize(("steps", "served"), [(3, False), (4, False), (5, True)])
def test_exporting_a_checkpoint_inside_zero_out_says_so(base, rows, tmp_path, caplog, steps, served):
    """Its borrowed channel holds the host's numbers still, which serving takes for decisions."""
    module = DMCModule(base, DMC(compression=2.0), phases=phases(4, 4, 2), seed=3)
    trainer = train(module, rows, tmp_path, steps)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with caplog.at_level("WARNING", logger="kvtrain"):
        assert (export_run(tmp_path / "last.ckpt", tmp_path / "out") / "config.json").is_file()
    assert served == ("not for use yet: the run is in its zero_out phase" not in caplog.text)


def test_a_recipe_without_zero_out_starts_from_zero_rows(base, rows, tmp_path):
    module = DMCModule(base, DMC(compression=2.0), phases=phases(0, 1, 0))
    module.configure_model()
    before = module.model.model.layers[0].self_attn.k_proj.weight[7::8].abs().max().item()
    train(module, rows, tmp_path, 1)
    after = module.model.model.layers[0].self_attn.k_proj.weight[7::8].abs().max().item()
    assert before > 0.1 and 0 < after < 0.011  # one AdamW step of 0.01 from zero


class SGDModule(RetrofitModule):
    """Plain gradient descent: AdamW would hide a wrong scale."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulation_is_one_big_batch(base, rows, tmp_path, clip):
    """Four micro-batches of ragged rows move the weights as one batch of all their rows does."""
    counts = rows.num_targets
    assert counts.max() > counts.min()
    results = []
    for batch_size, accumulate in ((1, 4), (4, 1)):
        module = SGDModule(base, phases=[Phase("train", 2, 1e-3)])
        train(module, rows, tmp_path, 2, batch_size, accumulate, gradient_clip_val=clip)
        results.append([p.detach().clone() for p in module.parameters()])
    fresh = SGDModule(base, phases=[Phase("train", 2, 1e-3)])
    fresh.configure_model()
    moved = max((a - b).abs().max().item() for a, b in zip(results[0], fresh.parameters(), strict=True))
    assert moved > 1e-3
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_the_hinge_pulls_towards_the_target(base, rows, tmp_path):
    """Thirty steps of strong pull raise the merged share of held-out rows."""
    module = DMCModule(base, DMC(compression=4.0, init_bias=1.0), phases=[Phase("finetune", 30, 3e-3)], seed=1)
    train(module, rows, tmp_path, 30, batch_size=8)
    batch = rows.batch(torch.arange(8).numpy())
    outputs = {}
    with torch.no_grad():
        module.model.eval()(batch["input_ids"], use_cache=False, document_ids=batch["document_ids"], outputs=outputs)
    assert torch.stack(list(outputs.values())).mean() > 0.3


@pytest.mark.parametrize("noisy", [True, False])
def test_the_last_phase_may_decide_without_noise(base, rows, noisy):
    """Ramps are noisy in any case, and random decisions are nothing but noise."""
    batch = rows.batch(torch.arange(2).numpy())

    def noise(step, method=None):
        module = DMCModule(base, method, phases=phases(), noisy_finetune=noisy)
        module.trainer = SimpleNamespace(validating=False, global_step=step, strategy=None)
        return module.model_arguments(batch)["step"].row_ids is not None

    assert noise(29)  # the last step of the ramp
    assert noise(30) is noisy
    assert noise(30, DMC(decisions="random"))


def test_the_hinge_has_its_weight(base, rows, monkeypatch):
    batch = rows.batch(torch.arange(2).numpy())
    for name in ("log", "log_mean"):
        monkeypatch.setattr(DMCModule, name, lambda *_, **__: None)

    def hinge(**settings):
        module = DMCModule(base, DMC(compression=4.0), phases=[Phase("finetune", 5, 1e-2)], **settings)
        module.trainer = SimpleNamespace(validating=False, global_step=0)
        return module.extra_loss(batch, {"outputs": {0: torch.zeros(2, 2, batch["input_ids"].shape[1])}})

    assert hinge().item() == pytest.approx(0.75)
    assert hinge(compression_weight=3.0).item() == pytest.approx(2.25)
    with pytest.raises(ValueError, match="compression_weight must be above 0"):
        hinge(compression_weight=0.0)


def test_steps_beyond_the_phases_are_refused(base, rows, tmp_path):
    with pytest.raises(ValueError, match="set it to 35 or less"):
        train(DMCModule(base, phases=phases()), rows, tmp_path, 36)


def test_missing_base_says_what_a_base_is(tmp_path):
    with pytest.raises(ValueError, match="kvtrain:tiny"):
        RetrofitModule(str(tmp_path / "none"), phases=phases()).build_model()


def test_distillation_learns_from_the_untouched_base(base, rows, tmp_path):
    """With the method off there is nothing to learn; with DMC the divergence is what falls; no teacher is saved."""
    losses = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.setdefault(type(module).__name__, []).append(trainer.callback_metrics["loss"].item())

    off = RetrofitModule(base, distill=True, phases=[Phase("train", 4, 1e-3)])
    train(off, rows, tmp_path, 4, callbacks=[Watch()])
    assert abs(losses["RetrofitModule"][0]) < 1e-6
    assert max(losses["RetrofitModule"]) < 1e-3  # weight decay is all that moves it
    fresh = RetrofitModule(base, phases=[Phase("train", 4, 1e-3)])
    fresh.configure_model()
    for ours, start in zip(off.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(ours, start, atol=1e-2, rtol=0)
    module = DMCModule(base, DMC(compression=1.0, init_bias=0.0), distill=True, phases=[Phase("finetune", 40, 3e-3)])
    trainer = train(module, rows, tmp_path, 40, batch_size=8, callbacks=[Watch()])
    history = losses["DMCModule"]
    assert sum(history[:5]) > 5e-4 and sum(history[-5:]) < 0.7 * sum(history[:5])
    assert not [name for name in module.state_dict() if "teacher" in name]
    assert len(trainer.optimizers[0].param_groups) == 2


def test_validation_measures_the_model_that_is(base, rows, tmp_path):
    """A phase opens with its first batch: looking before that must not speak of the next phase."""
    seen = []

    class Watched(DMCModule):
        def on_validation_epoch_start(self):
            super().on_validation_epoch_start()
            zeroed = all(bool((parameter[rows] == 0).all()) for parameter, rows in borrowed_parameters(self.model))
            seen.append((self.phase_step().phase.name, zeroed))

    module = Watched(base, DMC(), phases=phases(2, 2, 0))
    look = {"val_check_interval": 1, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    train(module, rows, tmp_path, 4, accumulate=2, **look)
    assert seen[:4] == [("zero_out", False)] * 4
    assert [name for name, _ in seen[4:]] == ["retrofit"] * 4 and seen[4][1]
