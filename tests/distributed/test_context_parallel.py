"""Ranks that share rows come to what one comes to that has them whole, or say in a line why they cannot."""

import pytest
import torch

import kvtrain
from kvtrain.cli import main
from kvtrain.data.listops import ListOpsDataModule
from kvtrain.data.module import PackedDataModule, data_place
from kvtrain.data.recall import RecallDataModule
from kvtrain.errors import UsageError
from kvtrain.kernels.context_parallel import ContextParallel
from kvtrain.training import Phase, PretrainModule, RetrofitModule, TransNormerModule
from kvtrain.training.cli import read_recipe
from kvtrain.training.estimate import estimate, estimate_recipe
from kvtrain.training.sharded_estimate import Division, strategy_of
from kvtrain.training.strategies import FSDP2
from kvtrain.training.strategies.fsdp2 import require_context_parallel, require_layout
from kvtrain.training.trainer import KVTrainer
from tests.hosts import make_host, random_ids

from .context_worker import CASES
from .launch import launch

ONE = [Phase("all", 20, 1e-3)]


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    return launch("tests.distributed.context_worker", 2, tmp_path_factory.mktemp("context"))


@pytest.mark.roads
@pytest.mark.parametrize("case", list(CASES))
def test_loss_and_gradients_are_those_of_whole_rows(apart, case):
    assert apart[case] < 1e-12


class Half(ContextParallel):
    """The second of two ranks, which never meets the first."""

    size = 2

    def own_tokens(self, whole):
        return whole[:, whole.shape[1] // 2 :]


def test_a_shared_model_has_no_cache():
    model = kvtrain.retrofit(make_host(), kvtrain.Full())
    model.context_parallel = Half()
    ids = random_ids(1, 8)
    assert model(ids).past_key_values is None
    assert model(ids).logits.shape[1] == 4
    with pytest.raises(ValueError, match="a cache holds whole rows, and ranks share this model's"):
        model(ids, use_cache=True)


def test_labels_stand_where_they_are_predicted():
    """The last token of the first half is asked for the first one of the second."""
    model = kvtrain.retrofit(make_host(layers=1), kvtrain.Full())
    ids = random_ids(2, 8)
    for part, expected in (((0, 4), ids[:, 1:5]), ((4, 8), torch.cat([ids[:, 5:], torch.full((2, 1), -100)], 1))):
        model.context_parallel = type(
            "Part", (Half,), {"own_tokens": lambda _, whole, part=part: whole[:, slice(*part)]}
        )()
        hidden = model.model(ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden).flatten(0, 1)
        told = {"labels": ids, "num_items_in_batch": 1, "use_cache": False}
        loss = torch.nn.functional.cross_entropy(logits, expected.flatten(), ignore_index=-100, reduction="sum")
        torch.testing.assert_close(model(ids, **told).loss, loss)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A host of three key-value heads."""
    folder = tmp_path_factory.mktemp("base")
    make_host(heads=6, kv_heads=3, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def test_ranks_must_divide_what_they_share(base):
    module = RetrofitModule(base, phases=ONE)
    require_context_parallel(module, 33, 3)
    require_context_parallel(module, None, 3)
    with pytest.raises(UsageError, match="context_parallel is 2, and the model has 3 key-value heads; take a number"):
        require_context_parallel(module, 32, 2)
    with pytest.raises(
        UsageError, match=r"does not divide rows of 32 tokens, or multiples of that; set data\.sequence_le"
    ):
        require_context_parallel(module, 32, 3)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ((1, 2, 3), "context_parallel is 2, which does not divide 3 ranks; lower it, or start more ranks"),
        ((2, 2, 6), "context_parallel is 2, which does not divide the 3 ranks of a copy"),
        ((4, 2, 6), "data_parallel_replicate_size is 4, which does not divide 6 ranks"),
    ],
)
def test_groups_must_divide_the_ranks(layout, words):
    require_layout(2, 2, 8)
    with pytest.raises(UsageError, match=words):
        require_layout(*layout)


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="context_parallel must be at least 1, not 0"):
        FSDP2(context_parallel=0)


def test_what_needs_whole_rows_refuses_by_name(base, monkeypatch):
    module = TransNormerModule(
        {"variant": "T1", "vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4}, phases=ONE
    )
    with pytest.raises(UsageError, match="TransNormerModule trains on whole rows alone; set context_parallel to 1"):
        module.require_context_parallel(2)
    monkeypatch.setattr(kvtrain.DMC, "supports_context_parallel", False)
    with pytest.raises(UsageError, match="DMC needs whole rows and all heads in one place; set context_parallel to 1"):
        RetrofitModule(base, kvtrain.DMC(), phases=ONE).require_context_parallel(3)


def test_a_command_refuses_in_a_line(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "trainer: {strategy: {class_path: kvtrain.training.strategies.FSDP2, init_args: {context_parallel: 2}}}\n"
    )
    told = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "1",
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
    ]
    assert main(["fit", "--config", "recipes/tiny/dmc.yaml", "--config", str(recipe), *told]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "kvtrain: error: context_parallel is 2, which does not divide 1 ranks; lower it, or start more ranks"
    )
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_ranks_that_share_rows_read_the_same():
    trainer = KVTrainer(strategy=FSDP2(context_parallel=2), accelerator="cpu", devices=1, logger=False)
    strategy = trainer.strategy
    places = []
    for rank in range(4):
        strategy._set_world_ranks = lambda: None
        strategy.cluster_environment.set_global_rank(rank)
        strategy.cluster_environment.set_world_size(4)
        places.append(tuple(data_place(trainer).values()))
    assert places == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert data_place(None) == {"rank": 0, "world_size": 1}


def test_data_say_what_divides_all_rows():
    assert PackedDataModule(sequence_length=100).length_multiple == 100
    assert RecallDataModule(sequence_length=100).length_multiple == 4
    assert ListOpsDataModule().length_multiple == 16


def test_an_estimate_counts_a_rank_s_tokens(tmp_path):
    host = {**make_host(kv_heads=4).config.to_dict(), "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(__import__("json").dumps(host))
    module = PretrainModule(str(tmp_path / "config.json"), phases=ONE)

    def held(tokens, shared):
        division = Division("fsdp2", 4, context_parallel=shared)
        return estimate(module, batch_size=2, sequence_length=tokens, precision="32-true", division=division)

    whole, parts, short = held(512, 1), held(512, 2), held(256, 1)
    assert parts.activation_bytes == short.activation_bytes < 0.6 * whole.activation_bytes
    assert (parts.parameter_bytes, parts.optimizer_bytes) == (whole.parameter_bytes, whole.optimizer_bytes)
    assert (parts.sequence_length, parts.kv_bytes_before) == (512, whole.kv_bytes_before)
    with pytest.raises(UsageError, match="does not divide rows of 511 tokens"):
        held(511, 2)


def test_an_estimate_reads_the_recipe(monkeypatch):
    settings = {"class_path": "kvtrain.training.strategies.FSDP2", "init_args": {"context_parallel": 4}}
    assert strategy_of({"strategy": settings}, 8) == Division("fsdp2", 8, context_parallel=4)
    module, data, trainer = read_recipe(["--config", "recipes/tiny/dmc.yaml", "--data.sequence_length", "64"])
    settings["init_args"]["context_parallel"] = 2
    found = estimate_recipe(module, data, {**trainer, "strategy": settings}, strategy="fsdp2", ranks=2)
    assert found.context_parallel == 2
    assert (
        estimate_recipe(module, data, {**trainer, "strategy": settings}, strategy="zero2", ranks=2).context_parallel
        == 1
    )
