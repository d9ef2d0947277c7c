"""Learning from the untouched base: recipes, what a step minimises, and what it logs."""

import pytest
import torch
import yaml
from torch.nn import functional as F

import kvtrain
from kvtrain.kernels.distillation import TeacherHead
from kvtrain.losses.distillation import Distillation
from kvtrain.metrics import read_metrics
from kvtrain.training.cli import read_recipe
from tests.hosts import make_host, random_ids

from .small_runs import fit, recipe_text, refused

SETTINGS = pytest.mark.parametrize("settings", [Distillation(), Distillation(0.7), Distillation(0.4, "reverse", 2.0)])


@SETTINGS
def test_a_models_loss_is_the_naive_mixture(settings):
    """Against dense logits of both models, over the targets alone."""
    student, teacher = (kvtrain.retrofit(make_host(seed=seed), kvtrain.Full()).train() for seed in (0, 1))
    ids = random_ids(2, 12)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4, -100)
    with torch.no_grad():
        hidden = teacher.model(ids, use_cache=False).last_hidden_state
    head = TeacherHead(hidden, teacher.lm_head.weight.detach())
    output = student(ids, labels=labels, use_cache=False, teacher=head, distillation=settings)
    counted, heat = labels[:, 1:] != -100, settings.temperature
    logits = [m(ids, use_cache=False).logits[:, :-1][counted] for m in (student, teacher)]
    p, q = (torch.softmax(logit / heat, -1) for logit in (logits if settings.direction == "reverse" else logits[::-1]))
    divergence = heat**2 * (p * (p / q).log()).sum(-1).mean()
    cross_entropy = F.cross_entropy(logits[0], labels[:, 1:][counted])
    expected = settings.weight * divergence + (1 - settings.weight) * cross_entropy
    torch.testing.assert_close(output.loss, expected)
    weight = student.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight) for loss in (output.loss, expected)))
    if settings.weight == 1.0:
        assert "loss_parts" not in output
    else:
        torch.testing.assert_close(
            output.loss_parts, {"divergence": divergence.detach(), "cross_entropy": cross_entropy.detach()}
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random host on disk."""
    folder = tmp_path_factory.mktemp("base")
    make_host("llama", dtype=torch.float32, vocab_size=4096).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def distilling(place, base, tmp_path):
    """Writes a recipe that trains the base on, with settings of the test's own."""

    def write(**settings):
        content = yaml.safe_load(recipe_text(place, tmp_path / "run"))
        phases = content["model"]["init_args"]["phases"]
        content["model"] = {"class_path": "RetrofitModule", "init_args": {"base": base, "phases": phases, **settings}}
        content["trainer"]["max_steps"] = 4
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({}, None),
        ({"distill": False}, None),
        ({"distill": None}, None),
        ({"distill": True}, Distillation()),
        ({"distill": {"weight": 0.5}}, Distillation(0.5)),
        ({"distill": {"direction": "reverse", "temperature": 2}}, Distillation(1.0, "reverse", 2.0)),
    ],
    ids=str,
)
def test_a_recipe_says_how_to_distil(distilling, settings, meant):
    assert read_recipe(["--config", str(distilling(**settings))]).module.distillation == meant


@pytest.mark.usefixtures("place")
def test_dmc_s_recipe_takes_the_same_settings():
    module = read_recipe(["--config", "recipes/tiny/dmc.yaml", "--model.distill.temperature", "2"]).module
    assert module.distillation == Distillation(temperature=2.0)


def test_a_mixing_run_logs_its_parts(distilling, tmp_path):
    """The base starts as its own student; the parts, weighed, are the loss of every row."""
    recipe = distilling(distill={"weight": 0.25, "direction": "reverse", "temperature": 2.0})
    assert fit(recipe) == 0
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 4
    for row in rows:
        assert row["loss"] == pytest.approx(0.25 * row["divergence"] + 0.75 * row["cross_entropy"], rel=1e-5)
    assert abs(rows[0]["divergence"]) < 1e-5 < rows[-1]["divergence"]
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"]
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["init_args"]["distill"]
    assert written == {"weight": 0.25, "direction": "reverse", "temperature": 2.0, "of": "logits"}
    assert fit(tmp_path / "run" / "config.yaml", "--ckpt_path", "last") == 0


def test_a_run_by_divergence_alone_logs_one_loss(distilling, tmp_path):
    assert fit(distilling(distill=True)) == 0
    rows = read_metrics(tmp_path / "run")
    assert abs(rows[0]["loss"]) < 1e-5
    assert not [name for row in rows for name in row if name in ("divergence", "cross_entropy")]


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"weight": 0}, "distill.weight is 0.0; it is a share, above 0 and up to 1"),
        ({"weight": 1.5}, "distill.weight is 1.5; it is a share, above 0 and up to 1"),
        ({"temperature": -1}, "distill.temperature is -1.0; it must be above 0"),
        ({"wieght": 1}, "unknown option 'model.distill.wieght'. Did you mean 'model.distill.weight'?"),
        ({"direction": "both"}, "model.distill.direction: expected forward, reverse, got 'both'"),
    ],
    ids=str,
)
def test_wrong_settings_are_answered_in_one_line(distilling, capsys, settings, answer):
    recipe = distilling(distill=settings)
    capsys.readouterr()  # transformers' progress bar
    assert refused(capsys, "fit", "--config", str(recipe)).endswith(answer)


def test_a_direction_must_be_one_of_two():
    with pytest.raises(ValueError, match="use forward or reverse"):
        Distillation(direction="sideways")
