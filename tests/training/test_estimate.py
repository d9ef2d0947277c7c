"""The sums behind ``kvtrain estimate``, against numbers worked out by hand and against a built model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kvtrain.cli import main
from kvtrain.models.dmc import DMC
from kvtrain.models.full import Full
from kvtrain.training import PretrainModule
from kvtrain.training.estimate import (
    activation_bytes,
    bytes_of_precision,
    compressed_kv_bytes,
    count_parameters,
    estimate,
    kv_bytes_per_token,
    meta_model,
    readable,
    table_rows,
)
from kvtrain.training.schedules import Phase

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


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
    config = LlamaConfig(**SIZES)
    assert kv_bytes_per_token(config) == 2 * 3 * 2 * 8 * 2
    assert kv_bytes_per_token(config, element_bytes=4) == 2 * 3 * 2 * 8 * 4
    assert compressed_kv_bytes(192, Full()) == 192
    assert compressed_kv_bytes(192, SimpleNamespace(compression=8.0)) == 24
    assert compressed_kv_bytes(192, SimpleNamespace()) is None


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    config = LlamaConfig(**SIZES)
    one = activation_bytes(config, 1, 10, 2, checkpointing=False)
    assert one == (3 * (4 * 16 + 2 * 6 * 8 + 4 * 24) + 2 * 16) * 10 * 2
    assert activation_bytes(config, 3, 20, 4, checkpointing=False) == one * 12
    checkpointed = activation_bytes(config, 1, 10, 2, checkpointing=True)
    assert checkpointed == (3 * 16 + (4 * 16 + 2 * 6 * 8 + 4 * 24) + 2 * 16) * 10 * 2
    assert checkpointed < one


@pytest.mark.parametrize(
    ("precision", "sizes"),
    [("bf16-mixed", (4, 2)), ("bf16-true", (2, 2)), ("32-true", (4, 4)), ("64-true", (8, 8)), ("unheard-of", (4, 4))],
)
def test_bytes_of_a_precision(precision, sizes):
    assert bytes_of_precision(precision) == sizes


@pytest.mark.parametrize(("precision", "weight"), [("bf16", 4), ("bf16-true", 2), (None, 4), (16, 4)])
def test_an_estimate_adds_up(tmp_path, precision, weight):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    module = PretrainModule(str(tmp_path), phases=[Phase("a", 3, 1e-3)])
    module.method = DMC(compression=4.0)
    figures = estimate(module, batch_size=2, sequence_length=10, precision=precision)
    count = hand_count(tied=False)
    assert figures.model == "KVLlamaForCausalLM with DMC"
    assert figures.parameters == figures.trainable == count
    assert figures.parameter_bytes == figures.gradient_bytes == count * weight
    assert figures.optimizer_bytes == 2 * count * weight
    assert (figures.kv_bytes_before, figures.kv_bytes_after) == (192, 48)
    rows = dict(table_rows(figures))
    assert rows["KV bytes per token, after"] == "48 B (4x less)"
    assert rows["parameters"] == f"{count:,}"


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
    assert figures["kv_bytes_before"] == 2 * 6 * 8 * 32 * 2
    assert main(recipe) == 0
    assert f"{figures['parameters']:,}" in capsys.readouterr().out
