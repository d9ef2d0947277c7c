"""Converting layers: what learns when, from what, and that going on is the same run."""

import pytest
import torch

import kvtrain
from kvtrain.losses.distillation import Distillation
from kvtrain.models.adapters import LoRA
from kvtrain.training import HybridModule, HybridPretrainModule, Phase
from tests.hosts import make_host

from .tiny_runs import make_rows, table, train

LAYERS = (0, 2)
OWN = tuple(f"model.layers.{layer}.self_attn." for layer in LAYERS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_host("qwen3", dtype=torch.float32, layers=3).save_pretrained(folder)
    return str(folder)


def module_on(base, match=5, distill=4, **training):
    steps = {"match": match, "distill": distill}
    phases = [Phase(name, count, 1e-2 if name == "match" else 1e-3) for name, count in steps.items() if count]
    return HybridModule(base, kvtrain.Hybrid(linear_layers=LAYERS), phases=phases, seed=3, **training)


def moved(model, base):
    """Names of the host's weights that are no longer its own."""
    found = model.state_dict()
    host = kvtrain.load(base, dtype=torch.float32).state_dict()
    return {name for name, weight in host.items() if not torch.equal(found[name], weight)}


def test_linear_layers_match_and_nothing_else_moves(base, rows, tmp_path):
    module = module_on(base, match=12, distill=0)
    train(module, rows, tmp_path, 12)
    names = moved(module.model, base)
    assert names == {name for name in module.model.state_dict() if name.startswith(OWN) and ".mixer_" not in name}
    figures = [row["match"] for row in table(tmp_path / "metrics.csv")]
    assert figures[-1] < 0.5 * figures[0]


def test_the_match_is_the_distance_to_the_hosts_attention(base, rows, tmp_path):
    """By hand: each linear layer alone on what enters the host's, against what comes out there."""
    module = module_on(base, match=1, distill=0)
    train(module, rows, tmp_path, 1)
    batch = next(iter(module.trainer.datamodule.train_dataloader()))
    host, seen = kvtrain.retrofit(kvtrain.load(base, dtype=torch.float32), kvtrain.Full()), {}

    def keep(attention, _, inputs, output):
        seen[attention.layer_idx] = inputs, output[0]

    for layer in LAYERS:
        host.model.layers[layer].self_attn.register_forward_hook(keep, with_kwargs=True)
    fresh = kvtrain.retrofit(make_host("qwen3", dtype=torch.float32, layers=3), module.method)
    told = {name: batch[name] for name in ("document_ids", "position_ids")}
    real = (batch["document_ids"] > 0)[..., None]
    with torch.no_grad():
        host(batch["input_ids"], use_cache=False, **told)
        shares = []
        for layer, (inputs, target) in seen.items():
            mixed, _ = fresh.model.layers[layer].self_attn(**inputs)
            shares.append((((mixed - target) * real) ** 2).sum() / ((target * real) ** 2).sum())
    assert table(tmp_path / "metrics.csv")[0]["match"] == pytest.approx(float(sum(shares) / 2), rel=1e-5)


def test_everything_is_distilled_from_the_untouched_host(base, rows, tmp_path):
    module = module_on(base, match=0, distill=3)
    train(module, rows, tmp_path, 3)
    assert moved(module.model, base) == set(kvtrain.load(base).state_dict())
    assert not moved(module._teacher[0], base)
    assert "match" not in table(tmp_path / "metrics.csv")[0]


@pytest.mark.parametrize("begun", [3, 5, 7], ids=["while it matches", "at the boundary", "while it is distilled"])
def test_a_resumed_run_is_the_run(base, rows, tmp_path, begun):
    whole = module_on(base)
    train(whole, rows, tmp_path / "whole", 9)
    trainer = train(module_on(base), rows, tmp_path / "begun", begun)
    trainer.save_checkpoint(tmp_path / "begun.ckpt")
    resumed = module_on(base)
    train(resumed, rows, tmp_path / "resumed", 9, ckpt_path=tmp_path / "begun.ckpt")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_hybrid_is_trained_from_nothing(base, rows, tmp_path):
    module = HybridPretrainModule(f"{base}/config.json", phases=[Phase("pretrain", 8, 1e-2)], seed=3)
    train(module, rows, tmp_path, 8)
    begun = module.build_model().state_dict()
    assert not [name for name, weight in module.model.state_dict().items() if torch.equal(weight, begun[name])]
    assert any(".mixer_gate." in name for name in begun)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"phases": [Phase("distill", 1, 1e-3), Phase("match", 1, 1e-3)]}, "phases are match, distill, in that order"),
        ({"phases": [Phase("all", 1, 1e-3)]}, "the recipe has all"),
        ({"distill": False}, "linear layers learn from the host"),
        ({"num_key_value_heads": 1}, "convert heads in a run of its own first"),
        ({"lora": LoRA(rank=2)}, "leave the phase match out, or lora"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, words):
    phases = [Phase("match", 1, 1e-3)]
    with pytest.raises(ValueError, match=words):
        HybridModule("unused", **{"phases": phases, "distill": Distillation(), **settings})
