"""Every recipe parses, builds without weights, and says what it is for."""

from functools import cache
from pathlib import Path

import pytest
import yaml

from kvtrain.errors import UsageError
from kvtrain.recipes import describe, list_recipes, nearest_recipe, read_recipe_file, recipes_folder, shown
from kvtrain.training.cli import read_recipe
from kvtrain.training.estimate import estimate
from kvtrain_cli import main

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SOME = (
    "dmc",
    "dms",
    "duo",
    "gqa",
    "lckv",
    "listops",
    "pretrain",
    "transnormer_t1",
    "dmc_llama7b",
)  # one a module, one large
FEWEST = 2


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@cache
def built(path):
    """The recipe's modules, which tests only look at."""
    return read_recipe(["--config", str(path)])


def meta_model_at_hand(recipe):
    """The model on the meta device; skips where its host's configuration lies on the Hub or is still to be made."""
    try:
        return recipe.module.build_meta_model()
    except (ValueError, OSError) as error:
        pytest.skip(f"no host configuration here: {error}")


def test_there_are_recipes():
    assert len(RECIPES) >= FEWEST
    assert [recipe.path for recipe in list_recipes()] == RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_its_modules(path):
    recipe = built(path)
    assert 0 < recipe.trainer["max_steps"] <= recipe.module.schedule.total_steps
    assert recipe.trainer["default_root_dir"].startswith("runs/")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_s_model_builds_without_weights(path):
    model = meta_model_at_hand(built(path))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in SOME else pytest.mark.roads, id=path.stem) for path in RECIPES],
)
def test_a_recipe_can_be_estimated(path):
    recipe = built(path)
    model = meta_model_at_hand(recipe)
    figures = estimate(recipe.module, batch_size=1, sequence_length=64, precision=recipe.trainer["precision"])
    assert figures.parameters == sum(parameter.numel() for parameter in model.parameters()) > 100_000
    assert figures.parameter_bytes + figures.gradient_bytes < figures.peak_bytes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_its_own_run_folder(path):
    folders = [yaml.safe_load(other.read_text())["trainer"]["default_root_dir"] for other in RECIPES]
    assert folders.count(yaml.safe_load(path.read_text())["trainer"]["default_root_dir"]) == 1


def test_recipes_are_listed_with_purpose_scale_and_hardware(capsys):
    for recipe in list_recipes():
        assert recipe.purpose, recipe.path
        assert recipe.scale, recipe.path
        assert recipe.hardware, recipe.path
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(shown(path) in listed for path in RECIPES)


def test_the_first_two_comment_lines_describe_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("# Do a thing.\n# Scale: 3 steps.  Hardware: one GPU.\nmodel: {}\n")
    assert describe(path).purpose == "Do a thing"
    assert (describe(path).scale, describe(path).hardware) == ("3 steps", "one GPU")
    path.write_text("# Do a thing\n# Scale: 1.5M tokens\n")
    assert (describe(path).scale, describe(path).hardware) == ("1.5M tokens", "")
    path.write_text("model: {}\n")
    assert (describe(path).purpose, describe(path).scale, describe(path).hardware) == ("", "", "")


def test_the_nearest_recipe_is_named():
    assert nearest_recipe("recipes/tiny/pretrian.yaml") == "recipes/tiny/pretrain.yaml"
    assert nearest_recipe("pretrain.yml") == "recipes/tiny/pretrain.yaml"
    assert nearest_recipe("zzzzz.yaml") is None


def test_recipes_inside_a_wheel_are_found(monkeypatch, tmp_path):
    (tmp_path / "kvtrain" / "recipes").mkdir(parents=True)
    monkeypatch.setattr("kvtrain.recipes._PACKAGE", tmp_path / "kvtrain")
    assert recipes_folder() == tmp_path / "kvtrain" / "recipes"
    (tmp_path / "recipes").mkdir()
    assert recipes_folder() == tmp_path / "recipes"
    monkeypatch.setattr("kvtrain.recipes._PACKAGE", tmp_path / "elsewhere" / "kvtrain")
    with pytest.raises(UsageError, match="carries no recipes"):
        recipes_folder()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1,\nb: 2\n", "line 3: not YAML"),
        (b"a: 1\n\tb: 2\n", "line 2: not YAML"),
        (b"", "the file holds nothing"),
        (b"just words", "the file holds text"),
        (b"- a\n", "the file holds a list"),
        (b"a: \xff\xfe\n", "not UTF-8 text"),
        (b"a: \x00\n", "not YAML"),
    ],
)
def test_an_unreadable_recipe_is_explained(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        read_recipe_file(str(path))
    assert str(refusal.value).startswith(str(path))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
