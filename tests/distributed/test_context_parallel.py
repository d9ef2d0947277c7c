"""Ranks that share rows come to what one comes to that has them whole, or say in a line why they cannot."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed import is_initialized

import kvtrain
from kvtrain.cli import main
from kvtrain.data.listops import ListOpsDataModule
from kvtrain.data.module import PackedDataModule, data_place
from kvtrain.data.recall import RecallDataModule
from kvtrain.errors import UsageError
from kvtrain.kernels.context_parallel import ContextParallel
from kvtrain.training import Phase, PretrainModule, RetrofitModule, TransNormerModule
from kvtrain.training.estimate import _division as recipe_division
from kvtrain.training.estimate import estimate, table_rows
from kvtrain.training.sharded_estimate import Division, strategy_of
from kvtrain.training.strategies import FSDP2
from kvtrain.training.strategies.fsdp2 import require_context_parallel, require_layout
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


class Part(ContextParallel):
    """One of two ranks, the other of which is thought to hold the same tokens.

    Args:
        tokens: Which it holds.
    """

    size = 2

    def __init__(self, tokens=slice(4, 8)):
        self.tokens = tokens

    def own_tokens(self, whole):
        return whole[:, self.tokens]

    def to_heads(self, *tokens):
        return tuple(heads[:, : heads.shape[1] // 2].repeat(1, 1, 2, 1) for heads in tokens)

    def to_tokens(self, heads):
        return heads[:, :, self.tokens].repeat(1, 2, 1, 1)


def test_a_shared_model_has_no_cache():
    model = kvtrain.retrofit(make_host(), kvtrain.Full())
    model.context_parallel = Part()
    ids = random_ids(1, 8)
    found = model(ids)
    assert found.past_key_values is None
    assert found.logits.shape[1] == 4
    with pytest.raises(ValueError, match="a cache holds whole rows, and ranks share this model's"):
        model(ids, use_cache=True)


@pytest.mark.parametrize("start", [0, 4])
def test_labels_stand_where_they_are_predicted(start):
    """The last token of the first half is asked for the first one of the second."""
    model = kvtrain.retrofit(make_host(layers=1), kvtrain.Full())
    model.context_parallel = Part(slice(start, start + 4))
    ids = random_ids(2, 8)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    logits, targets = model(ids, use_cache=False).logits.flatten(0, 1), shifted[:, start : start + 4].flatten()
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    for told in ({"labels": ids}, {"shift_labels": shifted}):
        torch.testing.assert_close(model(ids, num_items_in_batch=1, use_cache=False, **told).loss, expected)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A host of two key-value heads."""
    folder = tmp_path_factory.mktemp("base")
    make_host(dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def test_ranks_must_divide_what_they_share(base):
    module = RetrofitModule(base, phases=ONE)
    require_context_parallel(module, 32, 2)
    require_context_parallel(module, None, 2)
    with pytest.raises(UsageError, match="context_parallel is 4, and the model has 2 key-value heads; take a number"):
        require_context_parallel(module, 32, 4)
    with pytest.raises(UsageError, match=r"not divide rows of 33 tokens.*set data\.sequence_length to a multiple"):
        require_context_parallel(module, 33, 2)


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
    config = {"variant": "T1", "vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4}
    with pytest.raises(UsageError, match="TransNormerModule trains on whole rows alone; set context_parallel to 1"):
        TransNormerModule(config, phases=ONE).require_context_parallel(2)
    monkeypatch.setattr(kvtrain.DMC, "supports_context_parallel", False)
    with pytest.raises(UsageError, match="DMC needs whole rows and all heads in one place; set context_parallel to 1"):
        RetrofitModule(base, kvtrain.DMC(), phases=ONE).require_context_parallel(2)


def test_a_command_refuses_in_a_line(tmp_path, capsys):
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(
        "trainer: {strategy: {class_path: kvtrain.training.strategies.FSDP2, init_args: {context_parallel: 2}}}\n"
    )
    told, connected = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(run)], is_initialized()
    assert main(["fit", "--config", "recipes/tiny/dmc.yaml", "--config", str(recipe), *told]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "kvtrain: error: context_parallel is 2, which does not divide 1 ranks; lower it, or start more ranks"
    )
    assert not (run / "config.yaml").exists() and is_initialized() == connected


def test_ranks_that_share_rows_read_the_same(monkeypatch):
    places = []
    monkeypatch.setattr(FSDP2, "world_size", 4)
    for rank in range(4):
        monkeypatch.setattr(FSDP2, "global_rank", rank)
        told = FSDP2(context_parallel=2).distributed_sampler_kwargs
        places.append(tuple(data_place(SimpleNamespace(distributed_sampler_kwargs=told)).values()))
    assert places == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert data_place(None) == {"rank": 0, "world_size": 1}


def test_data_say_what_divides_all_rows():
    assert PackedDataModule(sequence_length=100).length_multiple == 100
    assert RecallDataModule(sequence_length=100).length_multiple == 4
    assert ListOpsDataModule().length_multiple == 16


def test_an_estimate_counts_the_tokens_of_a_rank(tmp_path):
    make_host(kv_heads=4).config.save_pretrained(tmp_path)
    module = PretrainModule(str(tmp_path / "config.json"), phases=ONE)

    def held(tokens, shared):
        division = Division("fsdp2", 4, context_parallel=shared)
        return estimate(module, batch_size=2, sequence_length=tokens, precision="32-true", division=division)

    parts, short = held(128, 2), held(64, 1)
    assert parts.activation_bytes == short.activation_bytes > 0
    assert parts.parameter_bytes == short.parameter_bytes
    assert (parts.sequence_length, parts.kv_bytes_before) == (128, 2 * short.kv_bytes_before)
    assert "activations (1/2 of 2 x 128 tokens)" in dict(table_rows(parts))
    with pytest.raises(UsageError, match="does not divide rows of 127 tokens"):
        held(127, 2)


def test_an_estimate_reads_the_recipe():
    settings = {"class_path": "kvtrain.training.strategies.FSDP2", "init_args": {"context_parallel": 4}}
    expected = Division("fsdp2", 8, context_parallel=4)
    assert strategy_of({"strategy": settings}, 8) == expected
    assert recipe_division({"strategy": settings}, None, 8) == expected
    assert recipe_division({"strategy": settings}, "fsdp2", 8) == Division("fsdp2", 8)
