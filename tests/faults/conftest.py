"""A place to train in, and a run that nothing interrupted."""

import pytest

from .runs import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVTRAIN_CACHE", str(folder / "cache"))
        yield Place.build(folder)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    place.finish(run)
    return run
