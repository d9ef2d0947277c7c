"""Names of version 0.1 are taken for one version more, and said to be old."""

import logging

import pytest
import torch

import kvtrain
from kvtrain import renamed
from tests.hosts import make_host


@pytest.fixture(autouse=True)
def nothing_said_yet():
    renamed._say.cache_clear()


def test_old_keys_at_any_depth(caplog):
    old = {"model": {"init_args": {"regularisation": 0.1}}, "phases": [{"initialisation": "normal"}], "seed": 1}
    with caplog.at_level(logging.WARNING, "kvtrain"):
        new = renamed.with_new_names(renamed.with_new_names(old))
    assert new == {"model": {"init_args": {"regularization": 0.1}}, "phases": [{"initialization": "normal"}], "seed": 1}
    assert caplog.messages == [
        "'regularisation' is now 'regularization'; the old name goes with version 0.3",
        "'initialisation' is now 'initialization'; the old name goes with version 0.3",
    ]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--model.init_args.regularisation", "--model.init_args.regularization"),
        ("--model.regularisation=0.1", "--model.regularization=0.1"),
        ("--model.compression=2", "--model.compression=2"),
        ("regularisation", "regularisation"),  # a value
    ],
)
def test_old_options(word, expected):
    assert renamed.option_with_new_name(word) == expected


def test_rounding_by_its_old_name():
    model = kvtrain.retrofit(make_host("llama"), kvtrain.Duo(sink=2, recent=4))
    with pytest.warns(FutureWarning, match=r"binarize\(\)"):
        assert model.binarise(0.5, gates=torch.rand(2, 2)) is model
    assert model.method.full_heads is not None
