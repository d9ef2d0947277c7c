"""Mistakes on the command line and in a recipe: one line each, with the place and the nearest right name."""

import re
from pathlib import Path

import pytest

from .small_runs import refused

ON_THE_LINE = [
    (["--trainer.max_stepz", "3"], "unknown option 'trainer.max_stepz'. Did you mean 'trainer.max_steps'?"),
    (["--trainer.max_stepz=3"], "unknown option 'trainer.max_stepz'. Did you mean 'trainer.max_steps'?"),
    (["--trainer.max_steps", "abc"], "trainer.max_steps: expected an integer, got 'abc'"),
    (["--trainer.max_steps"], "option '--trainer.max_steps' needs a value"),
    (["--trainer.num_threads", "x"], "trainer.num_threads: expected an integer or null, got 'x'"),
    (
        ["--model.init_args.weight_decya", "3"],
        "unknown option 'model.weight_decya'. Did you mean 'model.weight_decay'?",
    ),
    (["--model.weight_decay", "x"], "model.weight_decay: expected a number, got 'x'"),
    (["--data.batchsize", "3"], "unknown option 'data.batchsize'. Did you mean 'data.batch_size'?"),
    (["--data.batch_size=x"], "data.batch_size: expected an integer, got 'x'"),
    (["--model", "PretrainModul"], "unknown class 'PretrainModul'. Did you mean 'PretrainModule'?"),
    (
        ["--model", "kvtrain.training.PretrainModul"],
        "unknown class 'kvtrain.training.PretrainModul'. Did you mean 'kvtrain.training.PretrainModule'?",
    ),
    (
        ["--model", "kvtrain.trainin.PretrainModule"],
        "unknown class 'kvtrain.trainin.PretrainModule'. Did you mean 'kvtrain.training.PretrainModule'?",
    ),
    (["--data", "PackedDataModul"], "unknown class 'PackedDataModul'. Did you mean 'PackedDataModule'?"),
    (["--trainer.callbacks", "[Foo]"], "unknown class 'Foo'"),
    (["--trainer", "3"], "trainer: expected a mapping or a file with one, got '3'"),
    (["--confg", "x"], "unknown option 'confg'. Did you mean 'config'?"),
    (["extra"], "unexpected word 'extra'"),
    (
        ["--model.phases", "[{name: a, steps: 3, learning_rate: high}]"],
        "model.phases.learning_rate: expected a number, got 'high'",
    ),
    (["--data.batch_size", "0"], "batch_size must be at least 1, not 0"),
    (["--trainer.checkpoint_every", "0"], "trainer.checkpoint_every must be at least 1, not 0"),
    (["--trainer.num_threads", "0"], "trainer.num_threads must be at least 1, not 0"),
    (["--ckpt_path", "/nowhere.ckpt"], "no checkpoint at '/nowhere.ckpt'"),
    (["--data.corpus", "/nowhere"], "/nowhere: no such file or folder"),
    (["--model.model_config", "/nowhere.json"], "no model configuration at '/nowhere.json'"),
    (
        ["--model.method", "H2O"],
        "H2O decides while it serves what it keeps, and has nothing to train: train with",
    ),
    (["--trainer.max_steps", "500"], "trainer.max_steps is 500, the phases have 12 steps"),
]


@pytest.mark.parametrize(
    ("options", "answer"), ON_THE_LINE, ids=lambda value: "" if isinstance(value, str) else " ".join(value)[:40]
)
def test_a_mistake_on_the_command_line(capsys, recipe, options, answer):
    assert refused(capsys, "fit", "--config", str(recipe), *options).startswith(answer)
    assert not (recipe.parent / "run" / "checkpoints").exists()


def test_what_is_not_trained_has_no_cost_of_training(capsys, recipe):
    assert refused(capsys, "estimate", "--config", str(recipe), "--model.method", "H2O").startswith("H2O decides while")


def test_a_class_of_the_wrong_kind(capsys, recipe):
    answer = refused(capsys, "fit", "--config", str(recipe), "--model", "torch.nn.Linear")
    assert answer.startswith("torch.nn.Linear is not a TrainingModule; known are ")
    assert "PretrainModule" in answer


IN_THE_RECIPE = [
    ("max_steps:", "max_stepz:", 4, "unknown option 'trainer.max_stepz'. Did you mean 'trainer.max_steps'?"),
    ("max_steps: 12", "max_steps: abc", 4, "trainer.max_steps: expected an integer, got 'abc'"),
    ("seed: 3", "sede: 3", 24, "unknown option 'model.sede'. Did you mean 'model.seed'?"),
    (
        "final_learning_rate",
        "final_learnin_rate",
        23,
        "unknown option 'model.phases.final_learnin_rate'. Did you mean 'model.phases.final_learning_rate'?",
    ),
    ("steps: 7", "steps: seven", 21, "model.phases.steps: expected an integer, got 'seven'"),
    ("batch_size: 2", "batchsize: 2", 29, "unknown option 'data.batchsize'. Did you mean 'data.batch_size'?"),
    ("PretrainModule", "PretrainModul", 13, "unknown class 'PretrainModul'. Did you mean 'PretrainModule'?"),
    (
        "trainer:",
        "trianer:",
        3,
        "unknown option 'trianer.default_root_dir'. Did you mean 'trainer.default_root_dir'?",
    ),
    ("class_path: Pre", "klass: Pre", 12, "'model' needs a class_path, such as kvtrain.training."),
    ("steps: 5", "", None, "'model.phases.steps' is missing; the recipe must set it"),
    ("steps: 5", "steps: 0", None, "phase 'first': steps must be at least 1, not 0; leave the phase out"),
]


@pytest.mark.parametrize(("right", "wrong", "line", "answer"), IN_THE_RECIPE, ids=lambda value: str(value)[:30])
def test_a_mistake_in_the_recipe(capsys, recipe, right, wrong, line, answer):
    text = recipe.read_text()
    assert right in text
    recipe.write_text(text.replace(right, wrong))
    given = refused(capsys, "fit", "--config", str(recipe))
    found = re.match(rf"(?:{re.escape(str(recipe))} line (\d+): )?(.*)", given)
    assert found[2].startswith(answer)
    assert found[1] == (None if line is None else str(line_of(recipe, wrong)))


def line_of(recipe: Path, words: str) -> int:
    """The line that names the mistake, or, for a whole section, its first setting."""
    lines = recipe.read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if words in line)
    return {"trianer:": number + 1, "klass: Pre": number - 1}.get(words, number)


def test_a_missing_recipe_and_a_damaged_one(capsys, tmp_path):
    answer = refused(capsys, "fit", "--config", "recipes/tiny/pretrian.yaml")
    assert answer == "no recipe at 'recipes/tiny/pretrian.yaml'. Did you mean 'recipes/tiny/pretrain.yaml'?"
    (tmp_path / "bad.yaml").write_text("trainer:\n  - {a\n")
    assert refused(capsys, "fit", f"--config={tmp_path}/bad.yaml").startswith(f"{tmp_path}/bad.yaml line 3: not YAML")


@pytest.mark.parametrize("arguments", [[], ["--trainer.max_steps", "3"]], ids=str)
def test_no_recipe_at_all(capsys, arguments):
    assert refused(capsys, "fit", *arguments).startswith("no model to train: give a recipe with --config")
