"""What the standing callbacks measure, against numbers worked out by hand."""

import itertools
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvtrain.losses.distillation import Distillation
from kvtrain.models.full import Full
from kvtrain.models.host import retrofit
from kvtrain.training.callbacks import run_summary, throughput
from kvtrain.training.callbacks.head_compression import HeadCompression
from kvtrain.training.callbacks.memory import peak_resident_bytes
from kvtrain.training.callbacks.throughput import Throughput
from kvtrain.training.flops import peak_flops, training_flops
from tests.hosts import make_host

from .tiny_runs import BATCH, LENGTH, TinyDMC, TinyFull, make_rows, table, train

# Weights of the tiny host's products: queries and output 32 x 32, keys and values 32 x 16, three of 32 x 48.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
HEAD = 61 * 32
PRODUCTS = 2 * LAYER + HEAD


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("shards"))


def tiny_model(**settings):
    return retrofit(make_host(dtype=torch.float32, **settings), Full())


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_token(tied):
    """Two operations a weight, thrice; attention of 2 layers x 4 heads x 8 channels over half of 10 tokens."""
    attention = 2 * (2 * 2 * 4 * 8 * 10) // 2
    model = tiny_model(tie_word_embeddings=tied)
    assert training_flops(model, 10) == (3 * (2 * PRODUCTS + attention),) * 2
    assert 3 * attention == 12 * 2 * 4 * 8 * 10 // 2  # 12 L H D T, the causal half
    needed, done = training_flops(model, 10, teacher=model)
    assert done - needed == 2 * PRODUCTS + attention
    needed, done = training_flops(model, 10, teacher=tiny_model(kv_heads=4))  # four heads more, of 8 channels
    assert done - needed == 2 * PRODUCTS + attention + 2 * 2 * 2 * 32 * 16


def test_recomputed_layers_are_the_hardware_s_alone():
    model = tiny_model()
    plain = training_flops(model, 10)
    model.gradient_checkpointing_enable()
    needed, done = training_flops(model, 10)
    assert needed == plain.model
    assert done - needed == 2 * (2 * LAYER) + 2 * (2 * 4 * 8 * 10)  # the head is not recomputed


def test_a_frozen_weight_has_no_gradient_to_compute():
    model = tiny_model()
    plain = training_flops(model, 10).model
    model.model.layers[0].mlp.requires_grad_(False)
    assert plain - training_flops(model, 10).model == 2 * 3 * 32 * 48


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "16-mixed", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-true", 312e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5e12),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-mixed", None),
        ("NVIDIA H200", "transformer-engine", None),
        ("NVIDIA H200", "64-true", None),
    ],
)
def test_peaks_of_known_devices(monkeypatch, name, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda", 0), precision) == peak
    assert peak_flops(torch.device("cpu"), precision) is None


def test_tensor_cores_multiply_float32_where_torch_may(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100 80GB PCIe")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(torch.device("cuda", 0), "32-true") == 156e12


class Taught(TinyDMC):
    """With the untouched host for a teacher."""

    def __init__(self):
        super().__init__()
        self.distillation = Distillation()

    def _load_base(self):
        return make_host(dtype=torch.float32)


@pytest.mark.parametrize("kind", [TinyDMC, Taught])
def test_utilisation_follows_from_tokens_and_seconds(rows, tmp_path, monkeypatch, kind):
    """A clock that ticks two seconds a step, full rows: 2 x 2 x 32 tokens a step."""
    clock = itertools.count(0, 2)
    monkeypatch.setattr(throughput.time, "monotonic", lambda: next(clock))
    module = kind()
    module.activation_checkpointing = True
    train(module, rows, tmp_path, 3, accumulate_grad_batches=2, peak_flops=1e9)
    last = table(tmp_path / "metrics.csv")[-1]
    speed = 2 * BATCH * LENGTH / 2
    flops = training_flops(module.model, LENGTH, teacher=module.model if kind is Taught else None)
    assert last["tokens_per_second"] == speed
    assert last["mfu"] == pytest.approx(speed * flops.model / 1e9, rel=1e-6)
    assert last["hfu"] == pytest.approx(speed * flops.hardware / 1e9, rel=1e-6)
    assert flops.hardware / flops.model > (1.5 if kind is Taught else 1.2)


def test_a_processor_s_peak_is_not_guessed(rows, tmp_path):
    train(TinyFull(), rows, tmp_path, 3)
    assert {"mfu", "hfu"} & set(table(tmp_path / "metrics.csv")[-1]) == set()
    with pytest.raises(ValueError, match=r"trainer\.peak_flops must be positive, not 0"):
        Throughput(0)


def test_a_validation_starts_a_new_mean(monkeypatch):
    monkeypatch.setattr(throughput.time, "monotonic", lambda: 7.0)
    callback = Throughput()
    callback.on_validation_end(None, None)
    assert callback._marks == []
    callback._marks = [throughput._Mark(1.0, 10, 0.1), throughput._Mark(2.0, 20, 0.2)]
    callback.on_validation_end(None, None)
    assert callback._marks == [(7.0, 20, 0.2)]


class SlowRows:
    """Rows of which every batch takes a while, on a clock that nothing else moves."""

    def __init__(self, rows, clock):
        self.rows, self.clock = rows, clock

    def __getattr__(self, name):
        return getattr(self.rows, name)

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        self.clock.now += 0.25
        return self.rows.batch(indices)


def test_waiting_for_data_is_seconds_a_step(rows, tmp_path, monkeypatch):
    """Two batches a step, each of which takes a quarter of a second."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("kvtrain.data.loader.time", SimpleNamespace(perf_counter=lambda: clock.now))
    train(TinyFull(), SlowRows(rows, clock), tmp_path / "slow", 4, accumulate_grad_batches=2, enable_checkpointing=True)
    slow = [row["data_wait"] for row in table(tmp_path / "slow" / "metrics.csv") if "data_wait" in row]
    assert slow == [0.5] * 3
    train(TinyFull(), rows, tmp_path / "quick", 4)
    last = table(tmp_path / "quick" / "metrics.csv")[-1]
    assert last["data_wait"] == 0
    assert not {"tokens_per_second_least", "tokens_per_second_most"} & last.keys()  # one rank is its own least


def test_ranks_are_summed_and_their_extremes_named():
    """Four ranks, planted: what each of them measured."""
    ranks = torch.tensor([[100.0, 0.1, 1.0], [80.0, 0.5, 3.0], [120.0, 0.0, 2.0], [100.0, 0.2, 1.0]])
    logged = {}
    module = SimpleNamespace(
        device=torch.device("cpu"),
        trainer=None,
        all_gather=lambda own: ranks.clone(),
        log=lambda name, value, **_: logged.update({name: float(value)}),
    )
    callback = Throughput()
    callback._marks = [throughput._Mark(float(step), torch.tensor(step), 0.0) for step in range(3)]
    callback._log(module, LENGTH)
    assert logged == {
        "peak_memory_gib": 3.0,
        "tokens_per_second": 400.0,
        "tokens_per_second_least": 80.0,
        "tokens_per_second_most": 120.0,
        "data_wait": 0.5,
    }


def test_ranks_exchange_figures_where_they_are_logged_and_nowhere_else(rows, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(TinyFull, "all_gather", lambda self, own: calls.append(own.numel()) or own)
    train(TinyFull(), rows, tmp_path, 6, log_every_n_steps=3)
    assert calls == [3, 3]


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_precision_that_the_cpu_lacks_is_named(rows, tmp_path, monkeypatch, caplog, has_bfloat16):
    monkeypatch.setattr(run_summary, "cpu_has_bfloat16", lambda: has_bfloat16)
    train(TinyFull(), rows, tmp_path / "whole", 1)
    assert "bfloat16" not in caplog.text
    train(TinyFull(), rows, tmp_path / "half", 1, precision="bf16-mixed")
    assert ("set --trainer.precision 32-true" in caplog.text) != has_bfloat16


def test_peak_memory_is_logged_where_metrics_are(rows, tmp_path):
    train(TinyFull(), rows, tmp_path, 4, log_every_n_steps=2)
    logged = table(tmp_path / "metrics.csv")
    assert [row["step"] for row in logged if "peak_memory_gib" in row] == [1, 3]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 0.95 * resident <= peak_resident_bytes() <= 1.05 * used  # the kernel counts by the CPU, a little behind
    assert logged[-1]["peak_memory_gib"] == pytest.approx(peak_resident_bytes() / 2**30, rel=0.2)


def test_the_norm_is_the_gradient_s_before_clipping(rows, tmp_path):
    """One batch, by hand: the gradient of its mean loss over targets."""
    module = TinyFull()
    module.configure_model()
    train(TinyFull(), rows, tmp_path / "clipped", 1, gradient_clip_val=1e-3)
    trainer = train(TinyFull(), rows, tmp_path / "free", 1)
    batch = next(iter(trainer.datamodule.train_dataloader()))
    arguments = {name: batch[name] for name in ("document_ids", "position_ids", "labels")}
    module.model(
        batch["input_ids"], **arguments, num_items_in_batch=batch["num_items"], use_cache=False
    ).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item()
    for run in ("clipped", "free"):
        (row,) = table(tmp_path / run / "metrics.csv")
        assert row["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def merged_by_hand(module, rows):
    """Share of merges by (layer, head), token by token."""
    batch = rows.batch(torch.arange(5).numpy())
    documents, outputs = batch["document_ids"], {}
    with torch.no_grad():
        module.model.eval()(batch["input_ids"], document_ids=documents, use_cache=False, outputs=outputs)
    merged, free = torch.zeros(2, 2), 0
    for row, token in itertools.product(range(5), range(1, LENGTH)):
        if documents[row, token] > 0 and documents[row, token] == documents[row, token - 1]:
            free += 1
            merged += torch.stack([outputs[layer][row, :, token] for layer in (0, 1)])
    return merged / free


def head_table(run):
    return [(int(row["step"]), int(row["layer"]), int(row["head"])) for row in table(run / "head_compression.csv")]


VALIDATED = {"limit_val_batches": 1.0, "val_check_interval": 2}


def test_what_every_head_merges(rows, tmp_path):
    module = TinyDMC()
    train(module, rows, tmp_path, 4, **VALIDATED)
    assert head_table(tmp_path) == [(s, layer, head) for s in (1, 3) for layer in (0, 1) for head in (0, 1)]
    header = (tmp_path / "head_compression.csv").read_text().splitlines()[0]
    assert header == "step,layer,head,merged_fraction"
    last = torch.tensor([row["merged_fraction"] for row in table(tmp_path / "head_compression.csv")[-4:]])
    expected = merged_by_hand(module, rows).flatten()
    torch.testing.assert_close(last, expected, atol=1e-6, rtol=0)
    assert last.min() > 0.02 and last.std() > 0.01  # heads that merge, and differ
    held_out = table(tmp_path / "metrics.csv")[-1]["val_compression"]
    assert 1 / (1 - last.mean()) == pytest.approx(held_out, rel=0.02)  # which is a mean over rows


def test_a_resumed_run_adds_no_head_twice(rows, tmp_path):
    saving = {**VALIDATED, "enable_checkpointing": True, "checkpoint_every": 2}
    train(TinyDMC(), rows, tmp_path / "whole", 8, **saving)
    train(TinyDMC(), rows, tmp_path / "resumed", 6, **saving)
    train(TinyDMC(), rows, tmp_path / "resumed", 8, tmp_path / "resumed/checkpoints/step-000004.ckpt", **saving)
    whole = (tmp_path / "whole" / "head_compression.csv").read_text()
    assert (tmp_path / "resumed" / "head_compression.csv").read_text() == whole
    assert [step for step, layer, head in head_table(tmp_path / "whole") if layer == head == 0] == [1, 3, 5, 7]


def test_a_module_without_decisions_leaves_no_table(rows, tmp_path):
    train(TinyFull(), rows, tmp_path, 2, **VALIDATED)
    assert "val_loss" in table(tmp_path / "metrics.csv")[-1]
    assert not (tmp_path / "head_compression.csv").exists()


def test_validating_alone_writes_nothing(rows, tmp_path):
    module = TinyDMC()
    trainer = train(module, rows, tmp_path, 2)
    assert any(isinstance(callback, HeadCompression) for callback in trainer.callbacks)
    trainer.limit_val_batches = 1.0
    trainer.validate(module, trainer.datamodule, verbose=False)
    assert not (tmp_path / "head_compression.csv").exists()
