"""The sums behind ``kvtrain estimate``, against numbers worked out by hand, built models and real caches."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import kvtrain
from kvtrain.cli import main
from kvtrain.models.cache_size import cache_bytes, host_kv_bytes
from kvtrain.models.dmc import DMC
from kvtrain.models.full import Full
from kvtrain.training import PretrainModule, RetrofitModule
from kvtrain.training.estimate import count_parameters, estimate, readable, table_rows
from kvtrain.training.method_module import meta_model
from kvtrain.training.schedules import Phase
from tests.hosts import make_host, random_ids

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
PHASES = [Phase("a", 3, 1e-3)]


@pytest.fixture
def host(tmp_path):
    """A folder with a configuration and nothing else."""
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "host")
    return str(tmp_path / "host")


def hand_count(tied: bool) -> int:
    attention = 16 * (4 * 8) + 2 * 16 * (2 * 8) + (4 * 8) * 16
    layer = attention + 3 * 16 * 24 + 2 * 16
    return 3 * layer + 16 + 50 * 16 * (1 if tied else 2)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_exactly(tied):
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model = meta_model(config, Full())
    assert count_parameters(model) == (hand_count(tied), hand_count(tied))
    real = AutoModelForCausalLM.from_config(config)
    assert count_parameters(real)[0] == hand_count(tied)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_frozen_parameters_do_not_train():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False))
    model[0].requires_grad_(False)
    assert count_parameters(model) == (10, 2)


def test_kv_bytes_of_a_token():
    assert host_kv_bytes(LlamaConfig(**SIZES), 1) == 2 * 3 * 2 * 8 * 2


def real_cache_bytes(method, tokens):
    """What a served model's cache has allocated after one row, and the bytes of a page for every head."""
    model = kvtrain.retrofit(make_host(layers=3, dtype=torch.bfloat16), method)
    cache = model.make_cache()
    with torch.no_grad():
        model(random_ids(1, tokens), past_key_values=cache)
    pages = [layer.pages for layer in cache.layers]
    return cache.kv_bytes(), sum(store.num_heads * store.pool.page_bytes for store in pages)


@pytest.mark.parametrize("tokens", [1, 32, 33, 500])
def test_a_full_cache_is_foretold_exactly(tokens):
    config = make_host(layers=3).config
    assert cache_bytes(config, Full(), tokens) == real_cache_bytes(Full(), tokens)[0]


@pytest.mark.parametrize("tokens", [200, 777])
@pytest.mark.parametrize("page_size", [8, 32])
@pytest.mark.parametrize("compression", [1.7, 4.0])
def test_a_compressed_cache_is_foretold_to_a_page_a_head(tokens, page_size, compression):
    method = DMC(compression=compression, page_size=page_size, decisions="random")
    measured, page = real_cache_bytes(method, tokens)
    assert abs(cache_bytes(make_host(layers=3).config, method, tokens) - measured) <= page


def test_open_segments_count():
    """Of one row: window - 1 unrotated keys and values in bfloat16 with float32 importances, in 3 layers of 2 heads."""
    config = LlamaConfig(**SIZES)
    short, long = (cache_bytes(config, DMC(window=window), 100) for window in (1, 12))
    assert long - short == 3 * 2 * 11 * (2 * 8 * 2 + 4)


@pytest.mark.parametrize(("precision", "weight"), [("bf16", 4), ("bf16-true", 2), (None, 4), (16, 4), ("64-true", 8)])
def test_an_estimate_adds_up(host, precision, weight):
    module = PretrainModule(host, phases=PHASES)
    module.method = DMC(compression=4.0)
    figures = estimate(module, batch_size=2, sequence_length=10, precision=precision, accelerator="cpu")
    count = hand_count(tied=False)
    assert figures.model == "KVLlamaForCausalLM with DMC"
    assert figures.parameters == figures.trainable == count
    assert figures.parameter_bytes == figures.gradient_bytes == count * weight
    assert figures.optimizer_bytes == 2 * count * weight + 4 * (2 + 1 + 3 * 9)  # a counter for every parameter
    parts = ("parameter", "gradient", "optimizer", "teacher", "activation", "temporary")
    assert figures.peak_bytes == sum(getattr(figures, f"{part}_bytes") for part in parts)
    assert figures.teacher_bytes == 0 < figures.temporary_bytes
    assert figures.kv_bytes_before == 10 * 192
    assert not hasattr(module, "model")


def test_an_estimate_reads_well(host):
    module = RetrofitModule(
        host, DMC(page_size=4, window=1), distill=True, phases=PHASES, activation_checkpointing=True
    )
    figures = estimate(module, batch_size=2, sequence_length=1000, precision="bf16-mixed")
    rows = dict(table_rows(figures))
    assert rows["parameters"] == f"{hand_count(tied=False):,}"
    assert rows["KV cache of 1,000 tokens, before"] == "187.5 KiB (192 B a token)"
    assert figures.kv_bytes_after == 3 * 2 * (63 * (4 * 2 * 8 * 2 + 4) + 8) + 8  # 63 pages, their table, counters
    assert rows["KV cache of 1,000 tokens, after"] == "48.8 KiB (50 B a token, 3.84x less)"
    assert rows["activations (2 x 1,000 tokens, checkpointed)"] == readable(figures.activation_bytes)
    assert rows["teacher"] == readable(figures.teacher_bytes)


def test_converted_heads_count_after_and_not_before(host):
    module = RetrofitModule(host, num_key_value_heads=1, distill=True, phases=PHASES)
    figures = estimate(module, batch_size=1, sequence_length=32, precision=None)
    assert figures.kv_bytes_before == 32 * 192
    # A page; its number and a length, of which all layers have one; a row's position.
    assert figures.kv_bytes_after == 3 * 32 * 2 * 8 * 2 + 4 + 8 + 8
    assert hand_count(tied=False) - figures.parameters == 3 * 2 * 16 * 8


def test_an_unknown_precision_is_refused(host):
    with pytest.raises(ValueError, match=r"precision 'fp4'; there are 16-mixed, .*64-true"):
        estimate(PretrainModule(host, phases=PHASES), batch_size=1, sequence_length=8, precision="fp4")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**50, "1,024.0 TiB")]
)
def test_sizes_read_well(size, text):
    assert readable(size) == text


def test_the_command_prints_json_and_a_table(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    recipe = ["estimate", "--config", "recipes/tiny/pretrain.yaml", "--data.batch_size", "3"]
    assert main([*recipe, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["batch_size"], figures["sequence_length"], figures["precision"]) == (3, 1024, "bf16-mixed")
    assert figures["kv_bytes_before"] == 1024 * 2 * 6 * 8 * 32 * 2
    assert main(recipe) == 0
    captured = capsys.readouterr()
    assert f"{figures['parameters']:,}" in captured.out
    assert "runs on" not in captured.err
