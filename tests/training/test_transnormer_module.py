"""Training TransNormers from nothing: runs, their figures, resuming, estimates, and settings that are refused."""

import csv
import json
import math

import pytest
import torch
import yaml

from kvtrain.data.listops import ListOpsDataModule
from kvtrain.data.masking import MaskedDataModule
from kvtrain.data.module import PackedDataModule
from kvtrain.models.config import CHECKPOINT_KEY
from kvtrain.training import (
    Phase,
    TransNormerClassificationModule,
    TransNormerMaskedModule,
    TransNormerModule,
)
from kvtrain.training.base import split_parameters
from kvtrain.training.estimate import count_parameters, estimate, table_rows
from tests.thinning import thinned

from .small_runs import STEPS, acting, fit, recipe_text

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 8, "hidden_dropout": 0.0}
TEXT = {**SIZES, "vocab_size": 4096}
LISTS = {**SIZES, "num_block_heads": 1, "vocab_size": 16, "num_labels": 10}
EXPRESSIONS = {"max_depth": 3, "max_arguments": 3, "shortest": 4, "longest": 20}
PHASES = [Phase("all", STEPS, 1e-2)]

# Module, its settings, and the source of its batches with what it needs beside the small corpora.
KINDS = {
    "next tokens": (TransNormerModule, {"config": {**TEXT, "variant": "T1"}}, PackedDataModule, {}),
    "masked tokens": (
        TransNormerMaskedModule,
        {"preset": "roberta", "config": {**TEXT, "num_block_heads": 2, "attention_dropout": 0.0}},
        MaskedDataModule,
        {"mask_token_id": 1},
    ),
    "classes": (TransNormerClassificationModule, {"preset": "lra", "config": LISTS}, ListOpsDataModule, EXPRESSIONS),
}
KIND = pytest.mark.parametrize("kind", KINDS)


def path_of(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def data_settings(kind, packed):
    """Of the source of batches, from those of packed rows."""
    _, _, source, own = KINDS[kind]
    kept = packed if source is not ListOpsDataModule else {"batch_size": 4, "validation_rows": 18, "seed": 5}
    return source, {**kept, **own}


def write_recipe(folder, place, kind):
    module, settings, _, _ = KINDS[kind]
    content = yaml.safe_load(recipe_text(place, folder / "run"))
    arguments = {name: content["model"]["init_args"][name] for name in ("phases", "seed")}
    source, told = data_settings(kind, content["data"])
    content["model"] = {"class_path": path_of(module), "init_args": {**arguments, **settings}}
    content["data"] = {"class_path": path_of(source), "init_args": told}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """A run of each kind that nothing interrupted, by its kind."""
    found = {}

    def run(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp("whole")
            assert fit(write_recipe(folder, place, kind)) == 0
            found[kind] = folder / "run"
        return found[kind]

    return run


def checkpoint(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def figures(run, name):
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def rebuild(kind, run):
    """The module of a run with its last weights, and its source of batches."""
    module_class, settings, _, _ = KINDS[kind]
    module = module_class(**settings, phases=PHASES)
    module.configure_model()
    module.load_state_dict(checkpoint(run)["state_dict"])
    recipe = yaml.safe_load((run.parent / "recipe.yaml").read_text())
    _, _, source, _ = KINDS[kind]
    return module.eval(), source(**recipe["data"]["init_args"])


@KIND
def test_a_run_learns_and_its_figures_are_those_of_the_model(runs, kind):
    """Held-out loss and accuracy, worked out again from the last checkpoint, row by row."""
    run = runs(kind)
    assert figures(run, "val_loss")[-1] < figures(run, "val_loss")[0]
    module, data = rebuild(kind, run)
    loss = targets = right = 0.0
    with torch.no_grad():
        for batch in data.val_dataloader():
            out = module.model(
                batch["input_ids"], labels=batch["labels"], use_cache=False, **module.model_arguments(batch)
            )
            counted = batch["labels"][:, 1:] if kind == "next tokens" else batch["labels"]
            count = int((counted != -100).sum())
            loss, targets = loss + out.loss.item() * count, targets + count
            if kind == "classes":
                right += (out.logits.argmax(1) == batch["labels"]).sum().item()
    assert figures(run, "val_loss")[-1] == pytest.approx(loss / targets, rel=1e-4)
    assert figures(run, "val_perplexity")[-1] == pytest.approx(math.exp(loss / targets), rel=1e-3)
    accuracies = figures(run, "val_accuracy")
    if kind == "classes":
        assert targets == 18 and accuracies[-1] == pytest.approx(right / 18)
    else:
        assert accuracies == []


@KIND
@pytest.mark.parametrize("batch", thinned([7, 12], [7]))
def test_a_run_that_crashed_ends_with_the_same_bits(runs, place, tmp_path, kind, batch):
    recipe = write_recipe(tmp_path, place, kind)
    with pytest.raises(RuntimeError, match="planted"):
        fit(recipe, *acting("crash", batch))
    assert fit(recipe, "--ckpt_path", "last") == 0
    ours, theirs = checkpoint(tmp_path / "run")["state_dict"], checkpoint(runs(kind))["state_dict"]
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert figures(tmp_path / "run", "val_loss")[-1] == figures(runs(kind), "val_loss")[-1]


@KIND
def test_every_weight_learns(runs, kind):
    """Angles with the others, reflections not."""
    module_class, settings, _, _ = KINDS[kind]
    begun = module_class(**settings, phases=PHASES, seed=3).build_model().state_dict()
    ended = {name.removeprefix("model."): tensor for name, tensor in checkpoint(runs(kind))["state_dict"].items()}
    assert begun.keys() == ended.keys()
    same = {name for name in begun if torch.equal(begun[name], ended[name])}
    fixed = "theta" if kind == "classes" else "reflection"  # RoPE's angles are buffers
    assert same == {name for name in begun if name.endswith(fixed)} != set()


def test_what_a_checkpoint_says_of_its_model(runs):
    for kind, head in (
        ("next tokens", "CausalLM"),
        ("masked tokens", "MaskedLM"),
        ("classes", "SequenceClassification"),
    ):
        settings = json.loads(checkpoint(runs(kind))[CHECKPOINT_KEY])
        assert settings["config"]["architectures"] == [f"TransNormerFor{head}"]
        assert settings["config"]["model_type"] == "transnormer"
        assert settings["tokenizer"] == (None if kind == "classes" else "kvtrain:tiny")


@KIND
def test_weights_depend_on_the_seed_alone(kind):
    module_class, settings, _, _ = KINDS[kind]
    state = torch.get_rng_state()
    one, same, other = (
        module_class(**settings, phases=PHASES, seed=seed).build_model().state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_angles_and_vectors_do_not_decay():
    """The published recipe's decay pulls every angle to zero."""
    model = TransNormerModule(config=TEXT, phases=PHASES).build_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ([names[id(parameter)] for parameter in group] for group in split_parameters(model))
    assert decayed and all(name.endswith("proj.weight") for name in decayed)
    assert sum(name.endswith("theta") for name in plain) == 2
    assert len(decayed) + len(plain) == len(names)


@KIND
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_estimates(kind, precision):
    module_class, settings, _, _ = KINDS[kind]
    module = module_class(**settings, phases=PHASES)
    found = estimate(module, batch_size=2, sequence_length=40, precision=precision, accelerator="cpu")
    built = module.build_model()
    trainable = sum(p.numel() for p in built.parameters())
    assert (found.parameters, found.trainable) == count_parameters(built) == (trainable, trainable)
    assert found.parameter_bytes == found.gradient_bytes == 4 * trainable
    assert found.activation_bytes > 0 and found.model == f"{module.head.__name__} {module.config.variant}"
    if kind == "next tokens":
        cache = built.bfloat16().eval().make_cache()
        with torch.no_grad():
            built(torch.ones(1, 40, dtype=torch.long), past_key_values=cache)
        assert found.kv_bytes_after == cache.kv_bytes()
        assert found.kv_bytes_before == 40 * 2 * 2 * 16 * 2
    else:
        assert found.kv_bytes_before == found.kv_bytes_after == 0
        assert not [name for name, _ in table_rows(found) if "cache" in name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hiden_size": 16}, "unknown setting of a TransNormer 'hiden_size'. Did you mean 'hidden_size'?"),
        ({"num_key_value_heads": 2}, "unknown setting of a TransNormer 'num_key_value_heads'"),
        ({"block_sizes": 16}, "Did you mean 'block_size'?"),
        ({"variant": "T3"}, "variant must be 'T1' or 'T2', not 'T3'"),
    ],
)
@KIND
def test_wrong_settings_are_refused(kind, config, message):
    module_class = KINDS[kind][0]
    with pytest.raises(ValueError, match=r"setting|variant") as error:
        module_class(config=config, phases=PHASES)
    assert message in str(error.value)


def test_the_wrong_direction_is_refused_before_training():
    with pytest.raises(ValueError, match="set causal=False"):
        TransNormerMaskedModule(config=TEXT, phases=PHASES).build_meta_model()
    with pytest.raises(ValueError, match="set causal=True"):
        TransNormerModule(config={**TEXT, "num_block_heads": 2}, preset="roberta", phases=PHASES).build_meta_model()
    with pytest.raises(ValueError, match="no preset 'base'"):
        TransNormerModule(config=TEXT, preset="base", phases=PHASES)
