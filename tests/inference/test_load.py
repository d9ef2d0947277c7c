"""Models and tokenizers, from wherever they are named."""

import pytest
import torch

import kvtrain
from kvtrain.assets import ASSETS
from kvtrain.inference.load import open_model


def test_paths_are_names():
    """A folder may be given as a path or as its name, and holds what the short name stands for."""
    expected = kvtrain.load("kvtrain:copy").state_dict()
    for name in (ASSETS / "copy", str(ASSETS / "copy")):
        found, tokenizer = open_model(name)
        assert found.method == kvtrain.Full() and not found.training and tokenizer.is_fast
        for weights in (found.state_dict(), kvtrain.load(name).state_dict()):
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_missing_model_is_named(tmp_path, kind):
    with pytest.raises(ValueError, match=f"no model at '{tmp_path / 'none'}' "):
        kvtrain.load(kind(tmp_path / "none"))
