"""A recipe that trains in a fraction of a second."""

import pytest

from .small_runs import ROOT, recipe_text, write_place


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a small corpus, a small host, a callback that ends runs, and the tokenised corpora."""
    folder = tmp_path_factory.mktemp("small-runs")
    write_place(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVTRAIN_CACHE", str(folder / "cache"))
        patch.syspath_prepend(folder)
        patch.chdir(ROOT)
        yield folder


@pytest.fixture
def recipe(place, tmp_path):
    """A recipe of its own run folder, ``run`` beside it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(place, tmp_path / "run"))
    return path
