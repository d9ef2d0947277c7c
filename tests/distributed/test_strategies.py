"""The strategy without DeepSpeed, its configuration files, and the recipe that uses it."""

import json
from pathlib import Path

import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)

from kvtrain.errors import UsageError
from kvtrain.training.cli import read_recipe
from kvtrain.training.strategies import FSDP2, WORDS, DeepSpeedZeRO, deepspeed, read_config
from kvtrain.training.strategies.base import traits
from kvtrain.training.trainer import KVTrainer, check_strategy

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs/deepspeed").glob("*.json"))


@pytest.fixture
def without_deepspeed(monkeypatch):
    monkeypatch.setattr(deepspeed, "DEEPSPEED_INSTALLED", False)


def test_a_recipe_is_read_without_deepspeed(without_deepspeed, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = read_recipe(["--config", "recipes/dmc_llama7b.yaml"])
    assert recipe.trainer["strategy"] == "zero2"


def test_a_trainer_without_deepspeed_refuses(without_deepspeed, tmp_path):
    strategy = DeepSpeedZeRO({"zero_optimization": {"stage": 2}})
    with pytest.raises(UsageError, match=r"not installed: pip install kvtrain\[deepspeed\]"):
        KVTrainer(default_root_dir=str(tmp_path), strategy=strategy, accelerator="cpu", logger=False)


@pytest.mark.parametrize("strategy", ["fsdp", ModelParallelStrategy, DeepSpeedStrategy])
def test_a_strategy_under_which_ranks_would_train_apart_is_refused(strategy):
    with pytest.raises(ValueError, match="is none that kvtrain trains under; there are auto, ddp, fsdp2, zero2, zero3"):
        check_strategy(strategy if isinstance(strategy, str) else strategy.__new__(strategy))


def test_one_device_and_ddp_and_our_own_are_strategies():
    for strategy in (None, "auto", "DDP", DDPStrategy(), SingleDeviceStrategy()):
        check_strategy(strategy)
    check_strategy(DeepSpeedZeRO({"zero_optimization": {"stage": 2}}))
    check_strategy(type("Theirs", (FSDP2,), {"__module__": "theirs"})())


def test_words_stand_for_the_shipped_configurations(monkeypatch, tmp_path):
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(tmp_path)  # they are found from anywhere
    for word in ("zero2", "zero3", "zero3_offload"):
        found = StrategyRegistry.get(word).config
        assert found == read_config(str(ROOT / f"configs/deepspeed/{word}.json"))


def test_there_are_four_words():
    assert isinstance(StrategyRegistry.get("fsdp2"), FSDP2)
    assert {"fsdp2", "zero2", "zero3", "zero3_offload"} == set(WORDS)


def test_one_device_refuses_a_folder(tmp_path):
    with pytest.raises(UsageError, match=r"a folder, sharded by another strategy; go on with the trainer\.strategy"):
        traits(None).require_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("strategy", "words"), [(FSDP2(), "not written under fsdp2"), (None, "not written by DeepSpeed")]
)
def test_a_strategy_that_shards_refuses_a_file(tmp_path, strategy, words):
    (tmp_path / "last.ckpt").touch()
    strategy = strategy or DeepSpeedZeRO({"zero_optimization": {"stage": 2}})
    for fits in (True, False):
        with pytest.raises(UsageError, match=words):
            strategy.require_checkpoint(tmp_path / "last.ckpt", fits)


def test_the_published_recipe_adds_up(without_deepspeed, monkeypatch):
    """1,024 rows of 4,096 tokens a step; 6,000 retrofit steps for each unit of compression above 1."""
    monkeypatch.chdir(ROOT)
    module, data, trainer = read_recipe(["--config", "recipes/dmc_llama7b.yaml"])
    ranks = trainer["num_nodes"] * trainer["devices"]
    assert data.batch_size * trainer["accumulate_grad_batches"] * ranks == 1024
    assert data.sequence_length == 4096
    steps = {phase.name: phase.steps for phase in module.schedule.phases}
    assert steps == {"zero_out": 250, "retrofit": 6000 * (module.method.compression - 1), "finetune": 2000}
    assert trainer["max_steps"] == module.schedule.total_steps == 20_250
    assert 1024 * 4096 * module.schedule.total_steps == 84_934_656_000
    assert module.schedule.learning_rate(0) == module.schedule.learning_rate(18_249) == 3e-5
    assert module.schedule.learning_rate(20_249) == pytest.approx(3e-6)


def test_three_configurations_are_shipped():
    assert [path.stem for path in SHIPPED] == ["zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_configuration_sums_gradients_in_float32(path):
    config = read_config(str(path))
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"
    assert config["zero_optimization"]["stage"] == int(path.stem[4])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": {"type": "Adam"}}, "leave out optimizer; the recipe"),
        ({"gradient_clipping": 1.0, "scheduler": {}}, "leave out scheduler, gradient_clipping"),
        ({"zero_optimization": {"stage": 1}}, "stage must be 2 or 3, not 1"),
        ({"zero_optimization": {}}, "stage must be 2 or 3, not None"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device must be cpu or none",
        ),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(tmp_path, change, words):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | change))
    with pytest.raises(UsageError) as refusal:
        read_config(str(path))
    assert str(refusal.value).startswith(f"{path}: ")
    assert words in str(refusal.value)


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ("[]", "is a JSON object"), (None, "no DeepSpeed")])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, text, words):
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=words) as refusal:
        DeepSpeedZeRO(str(path))
    assert str(path) in str(refusal.value)
