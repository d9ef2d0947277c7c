"""A rehearsed step costs what a real one costs: tensor for tensor, and in the memory of a real process."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from kvtrain.models.adapters import LoRA
from kvtrain.models.dmc import DMC
from kvtrain.models.full import Full
from kvtrain.models.host import retrofit
from kvtrain.training import DMCModule, Phase, RetrofitModule, memory_estimate
from kvtrain.training.estimate import estimate
from kvtrain.training.memory_estimate import MemoryMeter, measure_step_memory
from kvtrain.training.meter import START
from tests.training.memory_worker import STATUS, build_module

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
VOCAB, LAYERS, ROWS, LENGTH = 30, 2, 2, 64
PHASES = [Phase("zero_out", 2, 1e-3), Phase("retrofit", 3, 1e-3)]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("host")
    LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, **SIZES).save_pretrained(folder)
    return str(folder)


def test_a_meter_counts_storages_from_birth_to_death():
    with MemoryMeter() as meter:
        first = torch.zeros(100)
        view = first.view(10, 10)[2:]
        view.add_(1)
        assert (meter.live, meter.peak) == (400, 400)
        second = torch.cat([first, first])
        assert (meter.live, meter.peak) == (1200, 1200)
        del first, second
        assert meter.live == 400  # the view holds it
        del view
        assert (meter.live, meter.peak) == (0, 1200)


def trained(config):
    """A model and its optimizer after a step."""
    model = retrofit(AutoModelForCausalLM.from_config(config), Full()).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    take_step(model, optimizer)
    return model, optimizer


def take_step(model, optimizer):
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_torch_s_own_tracker_says_the_same(host):
    """And takes more than twice as long."""
    config = AutoConfig.from_pretrained(host)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryMeter() as meter:
        model, optimizer = trained(config)
        meter.begin("step")
        take_step(model, optimizer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, optimizer = trained(config)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            take_step(model, optimizer)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    assert meter.peaks["step"].live == peak["Total"] > 500_000


@pytest.mark.parametrize("precision", ["32-true", pytest.param("64-true", marks=pytest.mark.slow)])
def test_all_experts_are_held_and_those_of_a_token_fed(tmp_path, monkeypatch, precision):
    """Whatever routers choose: a step is as large with values as without."""
    own = {**SIZES, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = Qwen3MoeConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, **own)
    config.save_pretrained(tmp_path)
    module, settings = DMCModule(str(tmp_path), DMC(), phases=PHASES), {"batch_size": ROWS, "sequence_length": LENGTH}
    figures = estimate(module, precision=precision, accelerator="cpu", **settings)
    assert figures.parameters == AutoModelForCausalLM.from_config(config).num_parameters() > LAYERS * 8 * 3 * 32 * 64
    monkeypatch.setattr(memory_estimate, "_without_values", contextlib.nullcontext)
    real = measure_step_memory(module, precision=precision, **settings)
    assert (figures.peak_bytes, figures.activation_bytes) == (real.peak, real.activations)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_fake_tensors_cost_what_real_ones_cost(host, monkeypatch, precision, checkpointing):
    """Every byte of every figure: the same step once without and once with values."""
    module = DMCModule(host, DMC(), distill=True, phases=PHASES, activation_checkpointing=checkpointing)
    settings = {"batch_size": ROWS, "sequence_length": LENGTH, "precision": precision, "every_layer": True}
    fake = measure_step_memory(module, **settings)
    monkeypatch.setattr(memory_estimate, "_without_values", contextlib.nullcontext)
    assert fake == measure_step_memory(module, **settings)
    assert fake.activations > 10_000


def test_a_teacher_is_a_second_base(host):
    module = RetrofitModule(host, num_key_value_heads=1, distill=True, phases=PHASES)
    memory = measure_step_memory(module, batch_size=ROWS, sequence_length=LENGTH, precision="bf16-true")
    converted = LAYERS * 2 * 32 * 8
    angles = 2 * (8 // 2) * 4
    assert memory.teacher == 2 * memory.parameters + 4 * converted + angles  # in float32, whatever the student is
    assert measure_step_memory(RetrofitModule(host, phases=PHASES), batch_size=1, sequence_length=8).teacher == 0


def test_a_teacher_beside_adapters_is_what_they_do_not_share(host):
    """All of it where weights are sharded."""
    pytest.importorskip("peft")
    settings = {"distill": True, "phases": PHASES, "lora": LoRA(rank=2)}
    shape, angles = {"batch_size": ROWS, "sequence_length": LENGTH}, 2 * (8 // 2) * 4
    converted = RetrofitModule(host, num_key_value_heads=1, **settings)
    assert measure_step_memory(converted, **shape).teacher == angles + 4 * LAYERS * 2 * 2 * 32 * 8  # of its own heads
    assert measure_step_memory(RetrofitModule(host, **settings), **shape).teacher == angles
    whole = RetrofitModule(host, **settings)
    whole.shares_teacher = False
    plain = measure_step_memory(RetrofitModule(host, phases=PHASES), **shape)
    assert measure_step_memory(whole, **shape).teacher == plain.parameters + angles


def test_quantised_weights_count_as_they_lie_there(host):
    """A byte a number where adapters are; nothing of the base's own is left after its model is made."""
    pytest.importorskip("torchao")
    module = RetrofitModule(host, phases=PHASES, distill=True, lora=LoRA(rank=2, quantize="int8"))
    memory = measure_step_memory(module, batch_size=ROWS, sequence_length=LENGTH, on_cpu=False)
    model = module.build_meta_model()
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    packed = sum(p.numel() for name, p in model.named_parameters() if p.dtype == torch.uint8)
    plain = RetrofitModule(host, phases=PHASES, lora=LoRA(rank=2)).build_meta_model()
    narrow = sum(p.numel() for name, p in plain.named_parameters() if ".base_layer." in name)
    assert memory.parameters == sum(sizes.values()) and packed == narrow > 10_000
    assert memory.teacher < 1_000 and START not in memory.moments


def test_what_the_device_and_accumulation_change(host):
    module = RetrofitModule(host, phases=PHASES, activation_checkpointing=True)
    settings = {"batch_size": ROWS, "sequence_length": LENGTH}
    plain, summed = measure_step_memory(module, **settings), measure_step_memory(module, **settings, accumulates=True)
    assert 0 < summed.peak - plain.peak <= plain.gradients  # the backward pass finds gradients in place

    module = RetrofitModule(host, phases=PHASES)
    plain, elsewhere = measure_step_memory(module, **settings), measure_step_memory(module, **settings, on_cpu=False)
    assert plain.activations == elsewhere.activations  # nowhere a mask that tells packed documents apart


def test_an_optimiser_that_updates_all_at_a_time_may_be_the_peak(host):
    memory = measure_step_memory(RetrofitModule(host, phases=PHASES), batch_size=1, sequence_length=2, on_cpu=False)
    held = memory.parameters + memory.gradients + memory.optimizer
    angles, undecayed = 2 * (8 // 2) * 4, 4 * (VOCAB * 32 + (2 * LAYERS + 1) * 32)
    assert memory.peak == held + angles + memory.parameters - undecayed  # a root for every decayed parameter


def measure(folder, case):
    """Bytes that a real training takes, in a process whose allocator keeps nothing that is freed."""
    shape = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    for name, sizes in (
        ("small", {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}),
        ("large", {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256}),
    ):
        AutoModelForCausalLM.from_config(LlamaConfig(**shape, **sizes)).save_pretrained(folder / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.training.memory_worker"]
    command += [str(folder / "small"), str(folder / "large"), json.dumps(case)]
    result = subprocess.run(command, capture_output=True, check=False, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


CASES = [
    pytest.param(method, precision, checkpointing, id=f"{method}-{precision}{'-checkpointed' if checkpointing else ''}")
    for method in ("full", "dmc")
    for precision in ("32-true", "bf16-mixed")
    for checkpointing in (False, True)
]


def check_against_a_process(folder, method, precision, checkpointing, rows, accumulate=1):
    settings = {"method": method, "distill": method == "dmc", "activation_checkpointing": checkpointing}
    shape = {"rows": rows, "length": 512, "precision": precision, "accumulate": accumulate}
    measured = measure(folder, {**settings, **shape})
    assert measured > 200 * 2**20  # tensors dominate
    figures = estimate(
        build_module(str(folder / "large"), **settings),
        batch_size=rows,
        sequence_length=512,
        precision=precision,
        accelerator="cpu",
        accumulate=accumulate,
    )
    assert figures.peak_bytes == pytest.approx(measured, rel=0.15)


linux = pytest.mark.skipif(not STATUS.is_file(), reason="needs Linux' account of a process's memory")


@linux
@pytest.mark.roads
def test_a_training_takes_the_memory_that_was_foretold(tmp_path):
    check_against_a_process(tmp_path, "dmc", "bf16-mixed", False, rows=12)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision", "checkpointing"), CASES)
def test_trainings_take_the_memory_that_was_foretold(tmp_path, method, precision, checkpointing):
    check_against_a_process(tmp_path, method, precision, checkpointing, rows=48 if checkpointing else 24)


@linux
@pytest.mark.slow
def test_accumulated_gradients_take_the_memory_that_was_foretold(tmp_path):
    check_against_a_process(tmp_path, "full", "32-true", True, rows=40, accumulate=2)
