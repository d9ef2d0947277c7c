"""TransNormers on disk: every head through its ``Auto*`` class, and what half precision must not touch."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

import kvtrain
from kvtrain.export.hf import export_run
from kvtrain.models.config import CHECKPOINT_KEY
from kvtrain.models.transnormer.heads import (
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForSequenceClassification,
)

HEADS = {
    AutoModelForCausalLM: (TransNormerForCausalLM, {"variant": "T1", "decay": "released", "num_block_heads": 4}),
    AutoModelForMaskedLM: (
        TransNormerForMaskedLM,
        {"causal": False, "pre_norm": False, "position_embedding": "learned", "embedding_norm": True},
    ),
    AutoModelForSequenceClassification: (
        TransNormerForSequenceClassification,
        {"causal": False, "norm": "batch", "num_labels": 3, "pooling": "first", "tie_word_embeddings": False},
    ),
}
HEAD = pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
IDS = torch.arange(2, 38).view(2, 18)


def build(auto):
    """A model whose statistics of batches and angles are not those that models begin with."""
    head, settings = HEADS[auto]
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "block_size": 5}
    config = kvtrain.TransNormerConfig(**sizes, **settings, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    model = head(config)
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d)):
            norm.momentum = 1.0  # all of the one batch that follows
        model.train()(IDS)
        for name, parameter in model.named_parameters():
            if name.endswith("theta"):
                parameter.mul_(1.01)
    return model.eval()


def write_run(folder, model):
    """A run folder with a checkpoint such as training writes."""
    model.config.architectures = [type(model).__name__]
    settings = {"config": json.loads(model.config.to_json_string(use_diff=False)), "tokenizer": None}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state, CHECKPOINT_KEY: json.dumps(settings)}, folder / "checkpoints" / "last.ckpt")
    return folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_wide(opened, original):
    """Angles and reflections to the bit, everything else in half precision."""
    kept = dict(original.state_dict())
    wide = {name for name in kept if "relative_position" in name}
    assert len(wide) == 6
    for name, tensor in opened.state_dict().items():
        if name in wide:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, kept[name]), name
        elif tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, kept[name].bfloat16()), name


@HEAD
def test_a_saved_model_is_the_same_model(tmp_path, auto):
    model = build(auto)
    model.save_pretrained(tmp_path / "saved")
    written = AutoConfig.from_pretrained(tmp_path / "saved").to_dict()
    assert {**written, "_name_or_path": ""} == model.config.to_dict()
    opened, found = auto.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(opened) is type(model) and not opened.training
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {name for name, t in model.state_dict().items() if not torch.equal(t, opened.state_dict()[name])} == set()
    assert torch.equal(logits(opened), logits(model))
    fresh = auto.from_config(model.config)
    assert type(fresh) is type(model) and not torch.equal(logits(fresh.eval()), logits(model))


@HEAD
def test_half_precision_leaves_angles_and_reflections(tmp_path, auto):
    model = build(auto)
    model.save_pretrained(tmp_path / "saved")
    half = auto.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert_wide(half, model)
    exported = export_run(write_run(tmp_path / "run", model), tmp_path / "out")
    opened = auto.from_pretrained(exported, dtype="auto")
    assert_wide(opened, model)
    torch.testing.assert_close(logits(opened).float(), logits(model), atol=0.1, rtol=0.1)


@HEAD
def test_an_exported_run_computes_what_was_trained(tmp_path, auto):
    model = build(auto)
    opened = auto.from_pretrained(export_run(write_run(tmp_path / "run", model), tmp_path / "out", dtype="float32"))
    assert opened.config.architectures == [type(model).__name__]
    assert torch.equal(logits(opened), logits(model))
    assert (tmp_path / "out" / "README.md").read_text().startswith("---")


def test_an_exported_model_generates_in_half_precision(tmp_path):
    """Over the borders of several blocks, what it decodes is what the parallel form finds likeliest or nearly so."""
    exported = export_run(write_run(tmp_path / "run", build(AutoModelForCausalLM)), tmp_path / "out")
    model = kvtrain.load(exported, dtype="auto").eval()
    ids = model.generate(IDS[:, :7], max_new_tokens=14, min_new_tokens=14, do_sample=False)
    assert model.dtype == torch.bfloat16 and ids.shape == (2, 21)
    with torch.no_grad():
        parallel = model(ids, use_cache=False).logits[:, 6:-1].float()
    parallel = parallel[..., 1:]  # without the end, which min_new_tokens forbids
    chosen = parallel.gather(-1, ids[:, 7:, None] - 1)[..., 0]
    assert (parallel.amax(-1) - chosen).max() < 0.1 < parallel.std()
