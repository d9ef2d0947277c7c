"""Models and tokenizers, from wherever they are named."""

import json
import sys

import pytest
import torch

import kvtrain
from kvtrain.assets import ASSETS
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.inference.load import open_model
from kvtrain_cli import main
from tests.hub.client import local_hub
from tests.hub.server import READER, Repository


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


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Nobody is logged in; a private repository holds a retrofitted model, in a folder and on a branch of their own."""
    folder = tmp_path_factory.mktemp("model")
    kvtrain.retrofit(kvtrain.load("kvtrain:copy"), kvtrain.DMC()).save_pretrained(folder)
    load_tokenizer("kvtrain:copy").save_pretrained(folder)
    with local_hub(tmp_path_factory.mktemp("hub"), token=None) as hub:
        repository = hub.repositories["org/private"] = Repository(private=True)
        repository.commit("main", {"README.md": b"nothing here"})
        repository.branches["trial"] = repository.branches["main"]
        repository.commit("trial", {f"inner/{path.name}": path.read_bytes() for path in folder.iterdir()})
        write_foreign(hub)
        yield hub


def write_foreign(hub):
    """A model whose class is in its own folder, and one whose class is in somebody else's."""
    for name, place in (("org/code", ""), ("org/lender", "org/code--")):
        config = {"model_type": "abacus", "auto_map": {"AutoConfig": f"{place}abacus.Abacus"}}
        code = (
            b"from transformers import PreTrainedConfig\nclass Abacus(PreTrainedConfig):\n    model_type = 'abacus'\n"
        )
        hub.repositories[name] = Repository(private=False)
        hub.repositories[name].commit("main", {"config.json": json.dumps(config).encode(), "abacus.py": code})


WHERE = {"revision": "trial", "subfolder": "inner"}


def test_a_private_model_opens_with_its_tokenizer_for_whom_it_is_shown_to(hub):
    model, tokenizer = open_model("org/private", token=READER, **WHERE)
    expected = kvtrain.load("kvtrain:copy")
    assert model.method == kvtrain.DMC() and tokenizer.get_vocab() == load_tokenizer("kvtrain:copy").get_vocab()
    assert torch.equal(model.get_input_embeddings().weight, expected.get_input_embeddings().weight)
    again = kvtrain.load("org/private", token=READER, **WHERE, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no model that can be opened at 'org/private'"):
        kvtrain.load("org/private", token=READER)  # another branch


@pytest.mark.parametrize("token", [None, "hf_unknown"])
def test_a_private_model_is_none_to_others(hub, token, tmp_path):
    with pytest.raises(ValueError, match="no model at 'org/private'") as error:
        kvtrain.load("org/private", token=token, cache_dir=tmp_path, **WHERE)
    assert "hf_unknown" not in str(error.value)


def test_code_runs_from_a_commit_that_was_named(hub, monkeypatch):
    """It gets as far as the model, of which there is no class for such a configuration."""
    commit, said = hub.repositories["org/code"].branches["main"], []
    monkeypatch.setattr("kvtrain.inference.load.logger.warning", lambda text, *args: said.append(text % args))
    with pytest.raises(ValueError, match=r"no model that can be opened at 'org/code' .*custom code"):
        kvtrain.load("org/code")
    for revision in (None, "main", commit[:12]):
        if revision == commit[:12]:
            hub.repositories["org/code"].branches[revision] = commit
        with pytest.raises(ValueError, match=f"pin it with revision='{commit}'"):
            kvtrain.load("org/code", trust_remote_code=True, revision=revision)
    assert not [name for name in sys.modules if name.endswith("abacus")]
    with pytest.raises(ValueError, match=r"no model that can be opened at 'org/code' .*Abacus"):
        kvtrain.load("org/code", trust_remote_code=True, revision=commit)
    assert said == [f"code of org/code at commit {commit} may run"]
    assert [name for name in sys.modules if name.endswith("abacus")]


@pytest.mark.parametrize(
    ("name", "code_revision"), [("org/lender", None), ("org/lender", "main"), ("org/code", "main")]
)
def test_code_that_is_elsewhere_is_pinned_there(hub, name, code_revision):
    commit = hub.repositories[name].branches["main"]
    kwargs = {"trust_remote_code": True, "revision": commit, "code_revision": code_revision}
    with pytest.raises(ValueError, match="runs code of org/code: pin it with code_revision, a commit of 40 digits"):
        kvtrain.load(name, **kwargs)


def test_megatron_s_pickles_are_refused_with_the_reason(tmp_path, capsys):
    """The only form in which weights of DMC were published."""
    shard = tmp_path / "iter_0001" / "mp_rank_00" / "model_optim_rng.pt"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"\x80\x02")
    for place in (tmp_path, shard):
        assert main(["generate", str(place), "--prompt", "x"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"kvtrain: error: {place} holds Megatron's pickles, which can run code")
