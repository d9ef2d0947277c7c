"""What a rank of several holds: the shares by hand, and the whole against ranks that train."""

import importlib.util
import json

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from kvtrain.errors import UsageError
from kvtrain.recipes import find_config
from kvtrain.training import strategies
from kvtrain.training.cli import read_recipe
from kvtrain.training.estimate import estimate, estimate_recipe
from kvtrain.training.memory import Held, TrainingMemory
from kvtrain.training.sharded_estimate import Division, Sizes, rank_memory, rehearsed_precision, strategy_of
from kvtrain_cli import main
from tests.distributed.launch import launch

from .memory_worker import STATUS, build_module
from .sharded_memory_worker import zero_settings

# A thousand elements, all trained, in float32: 4,000 bytes of weights, and 3,000 of others at most in a step.
SIZES = Sizes(parameters=1000, trained=1000, layer=200, root=400, group=900)
STEP = ("step", 0)
MOMENTS = {
    "start": Held(4000, 0, 0, 0),
    STEP: Held(4000, 0, 8000, 3000),
    (STEP, "back", 1, 1): Held(4000, 4000, 8000, 1000),
    ("update", 0): Held(4000, 4000, 8000, 9999),  # DeepSpeed has one of its own
}
WHOLE = TrainingMemory(4000, 4000, 8000, 0, (2000,), MOMENTS)
HALF = TrainingMemory(2000, 2000, 4000, 0, (1000,), {STEP: Held(2000, 0, 4000, 1500)})
SMALL = {"reduce_bucket_size": 100, "stage3_max_live_parameters": 300}


def rank(strategy, memory=WHOLE, *, mixed=False, on_cpu=True, ranks=4, copies=1, saved=None):
    division = Division(strategy, ranks, SMALL, copies)
    return rank_memory(
        memory, SIZES, division, mixed=mixed, on_cpu=on_cpu, saved=memory.parameters if saved is None else saved
    )


def test_ddp_holds_all_and_gradients_twice():
    held = rank("ddp")
    assert (held.parameters, held.gradients, held.optimizer) == (4000, 8000, 8000)
    assert held.peak == WHOLE.peak + 4000
    assert held.checkpoint == 12000


def test_zero_divides_masters_moments_and_gradients():
    two, three = rank("zero2"), rank("zero3")
    assert (two.parameters, two.gradients, two.optimizer) == (4000, 1000, 3000)
    assert (three.parameters, three.gradients, three.optimizer) == (1000, 1000, 3000)
    # ZeRO-2 in a step: two buckets. ZeRO-3: one, and the layers that are whole.
    assert two.peak == max(8000 + 3000 + 2 * 400, 8000 + 3 * 900)
    assert three.peak == max(5000 + 3000 + 400 + 300 * 4, 5000 + 3 * 900)
    assert rank("zero3", on_cpu=False).peak == 5000 + 3000 + 400 + 300 * 4
    assert two.checkpoint == three.checkpoint == 4000 + 4 * 3000


def test_zero_in_half_precision_has_float32_masters():
    held = rank("zero3", HALF, mixed=True)
    assert (held.parameters, held.gradients, held.optimizer) == (500, 1000, 3000)
    assert held.peak == max(4500 + 1500 + 100 * (2 + 4) + 300 * 2, 4500 + 3 * 900)


def test_offloading_leaves_the_layers_at_work():
    held = rank("zero3_offload", on_cpu=False)
    assert held.offloaded == 5000
    assert held.peak == 3000 + 400 + 300 * 4
    assert rank("zero3_offload").offloaded == 0  # on the CPU it is all one memory


def test_fsdp2_gathers_the_root_and_two_layers():
    held = rank("fsdp2")
    assert (held.parameters, held.gradients, held.optimizer) == (1000, 1000, 2000)
    under_way = 8 * 400  # as they are computed, and in float32
    # The forward pass ends with most activations, the backward pass with most gradients.
    assert held.peak == 3000 + max(3000, 1000 + 1000) + 4 * (400 + 2 * 200) + under_way
    half = rank("fsdp2", HALF, mixed=True)
    assert (half.parameters, half.gradients, half.optimizer) == (1000, 1000, 2000)  # masters are what is divided
    assert half.peak == 3000 + 1500 + 2 * (400 + 2 * 200) + (2 + 4) * 400
    assert held.checkpoint == half.checkpoint == 12000


def test_what_trains_alone_is_saved_alone_but_by_deepspeed():
    assert rank("ddp", saved=500).checkpoint == rank("fsdp2", saved=500).checkpoint == 500 + 8000
    assert rank("fsdp2", HALF, mixed=True, saved=250).checkpoint == 2 * (250 + 4000)  # masters
    assert rank("zero2", saved=500).checkpoint == rank("zero3", saved=500).checkpoint == 4000 + 4 * 3000


def test_copies_of_the_model_are_divided_by_their_own_ranks_alone():
    assert rank("fsdp2", ranks=8, copies=4) == rank("fsdp2", ranks=2)
    with pytest.raises(UsageError, match="data_parallel_replicate_size is 3, which does not divide 8 ranks"):
        rank("fsdp2", ranks=8, copies=3)


def test_a_divided_teacher_is_no_activation():
    taught = TrainingMemory(4000, 4000, 8000, 2000, (2000,), {STEP: Held(4000, 0, 8000, 5000)})
    assert rank("fsdp2", taught).peak == rank("fsdp2").peak + 500
    assert rank("zero2", taught).teacher == 2000


def test_the_recipe_s_strategy_is_known_by_word_and_by_class(tmp_path, monkeypatch):
    zero = {"class_path": "kvtrain.training.strategies.DeepSpeedZeRO"}
    three = {**zero, "init_args": {"config": find_config("configs/deepspeed/zero3.json")}}
    assert strategy_of({"strategy": three}, 8).strategy == "zero3"
    assert strategy_of({"strategy": three}, 8).zero["stage3_max_live_parameters"] == 10**9
    offloaded = {**zero, "init_args": {"config": find_config("configs/deepspeed/zero3_offload.json")}}
    assert strategy_of({"strategy": offloaded}, 8).strategy == "zero3_offload"
    monkeypatch.chdir(tmp_path)  # shipped configurations are found from anywhere
    shipped = {**zero, "init_args": {"config": "configs/deepspeed/zero2.json"}}
    assert strategy_of({"strategy": shipped}, 8).strategy == "zero2"
    copied = {"class_path": "kvtrain.training.strategies.FSDP2", "init_args": {"data_parallel_replicate_size": 4}}
    assert strategy_of({"strategy": copied}, 8) == Division("fsdp2", 8, copies=4)
    assert strategy_of({"strategy": {**copied, "init_args": {}}}, 8) == Division("fsdp2", 8)
    assert strategy_of({"strategy": "fsdp2"}, 8) == Division("fsdp2", 8)
    assert strategy_of({"strategy": "ZERO2"}, 8) == Division("zero2", 8)
    assert strategy_of({"strategy": "auto"}, 8) == Division("ddp", 8)
    assert strategy_of({"strategy": "auto"}, 1) == Division("", 1)


def test_half_precision_is_rehearsed_as_it_is_sharded():
    assert [rehearsed_precision(name, "bf16-mixed") for name in ("", "ddp", "zero2", "fsdp2")] == [
        *("bf16-mixed", "bf16-mixed", "bf16-true", "bf16-true")
    ]
    assert rehearsed_precision("zero3", "32-true") == "32-true"


def test_a_model_is_counted_by_layers_and_root():
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    root = 2 * 30 * 16 + 16
    decayed = 3 * (layer - 2 * 16) + 30 * 16  # matrices, the embedding apart
    assert Sizes.of(model) == Sizes(3 * layer + root, 3 * layer + root, layer, root, decayed)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.chdir(find_config("recipes").removesuffix("recipes") or ".")
    return "recipes/tiny/dmc.yaml"


def test_the_command_tells_of_one_rank(tiny, capsys):
    arguments = ["estimate", "--config", tiny, "--devices", "8", "--data.sequence_length", "64", "--json"]
    assert main([*arguments, "--strategy", "zero3"]) == 0
    sharded = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    replicated = json.loads(capsys.readouterr().out)
    assert (sharded["strategy"], sharded["ranks"]) == ("zero3", 8)
    assert (replicated["strategy"], replicated["ranks"]) == ("ddp", 8)
    assert sharded["optimizer_bytes"] == 3 * -(-4 * sharded["trainable"] // 8)
    assert sharded["peak_bytes"] < replicated["peak_bytes"]
    assert main(["estimate", "--config", tiny, "--strategy", "zero4"]) == 2
    assert capsys.readouterr().err == "kvtrain: error: unknown strategy 'zero4'. Did you mean 'zero3'?\n"
    assert main(["estimate", "--config", tiny, "--devices", "0"]) == 2
    assert capsys.readouterr().err == "kvtrain: error: --devices must be at least 1, not 0\n"


def test_a_recipe_s_copies_count_until_another_strategy_takes_its_place(tiny):
    strategy = "{class_path: kvtrain.training.strategies.FSDP2, init_args: {data_parallel_replicate_size: 4}}"
    recipe = read_recipe(["--config", tiny, "--data.sequence_length", "64", "--trainer.strategy", strategy])
    copied, divided = estimate_recipe(*recipe, ranks=8), estimate_recipe(*recipe, strategy="fsdp2", ranks=8)
    assert (copied.strategy, copied.ranks) == (divided.strategy, divided.ranks) == ("fsdp2", 8)
    assert copied.parameter_bytes == pytest.approx(4 * divided.parameter_bytes, abs=4)
    assert copied.checkpoint_bytes == divided.checkpoint_bytes


def test_without_devices_one_device_does_all(tiny):
    recipe = read_recipe(["--config", tiny, "--data.sequence_length", "64"])
    assert (estimate_recipe(*recipe).strategy, estimate_recipe(*recipe).ranks) == ("", 1)


SHAPE = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8}
MODELS = {
    "small": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 4},
    "large": {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 64},
}
CASES = [
    pytest.param(name, precision, rows, more, id=f"{name}-{precision}-{rows} rows{'-taught' if more else ''}")
    for name, precision, rows, *more in (
        ("ddp", "32-true", 1),
        ("fsdp2", "bf16-mixed", 1),
        ("fsdp2", "32-true", 1, "distill"),
        ("zero3", "32-true", 1, "distill"),
        ("zero2", "32-true", 1),
        ("zero3", "32-true", 1),
        ("zero3", "bf16-mixed", 1),
        ("zero3", "32-true", 16),
        ("fsdp2", "32-true", 1),
        ("fsdp2", "32-true", 16),
    )
]


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.is_file(), reason="needs Linux' account of a process's memory")
@pytest.mark.parametrize(("name", "precision", "rows", "more"), CASES)
def test_a_rank_takes_the_memory_that_was_foretold(tmp_path, name, precision, rows, more):
    if name == "fsdp2" and not hasattr(strategies, "FSDP2"):
        pytest.skip("this kvtrain has no FSDP2")
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install kvtrain[deepspeed]")
    for folder, sizes in MODELS.items():
        AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, **sizes)).save_pretrained(tmp_path / folder)
    settings = dict.fromkeys(more, True)
    case = {"name": name, "rows": rows, "length": 256, "precision": precision, **settings}
    measured = launch(
        "tests.training.sharded_memory_worker",
        2,
        tmp_path,
        json.dumps(case),
        DS_ACCELERATOR="cpu",
        MALLOC_MMAP_THRESHOLD_="65536",
        OMP_NUM_THREADS="1",
    )
    zero = zero_settings(name) if name.startswith("zero") else {}
    figures = estimate(
        build_module(str(tmp_path / "large"), method="full", **settings),
        batch_size=rows,
        sequence_length=256,
        precision=precision,
        accelerator="cpu",
        division=Division(name, 2, zero),
    )
    assert measured > 200 << 20  # tensors dominate
    assert figures.peak_bytes == pytest.approx(measured, rel=0.1)
