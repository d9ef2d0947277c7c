"""Folders go to a Hub, whole or not at all, and come back as they were."""

import json
import os
import shlex
import shutil

import pytest
import torch
from fastapi import Response
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

import kvtrain
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain_cli import main
from tests.caches import CACHES, MAIN, SOME_MAIN
from tests.export.test_hf import write_run
from tests.hosts import make_host, random_ids
from tests.hub.client import local_hub
from tests.hub.server import READER, WRITER, Repository, oid
from tests.thinning import thinned

NAME = "org/model"


@pytest.fixture
def hub(tmp_path):
    """A Hub of its own for each test."""
    with local_hub(tmp_path) as hub:
        yield hub


def write_folder(folder, name="dmc", shards="5GB"):
    """A model of some kind with a tokenizer and a card."""
    host = make_host("llama", dtype=torch.float32, layers=CACHES[name].layers if name in CACHES else 2)
    model = CACHES[name].retrofit(host) if name in CACHES else host
    model.save_pretrained(folder, max_shard_size=shards)
    load_tokenizer("kvtrain:tiny").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: kvtrain\n---\n# A model\n")
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def held(hub, branch="main", name=NAME):
    """Files of a branch, but for what the Hub itself puts there."""
    repository = hub.repositories[name]
    files = repository.commits[repository.branches[branch]]
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def refused(capsys, *argv):
    """The line that a command line is refused with."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("kvtrain: error: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    for token in (WRITER, READER, "signature=secret"):
        assert token not in captured.err + captured.out
    return lines[0].removeprefix("kvtrain: error: ")


def pushes(hub):
    return [call for call in hub.calls if call.startswith("PUT") or "/commit/" in call]


@pytest.mark.parametrize("name", thinned([*MAIN, "host"], [*SOME_MAIN, "host"]))
def test_what_is_pushed_comes_back(hub, tmp_path, capsys, name):
    model = write_folder(tmp_path / "out", name)
    assert main(["push", str(tmp_path / "out"), NAME, "--private"]) == 0
    commit = hub.repositories[NAME].branches["main"]
    assert capsys.readouterr().out.endswith(f"{NAME}@main: pushed in commit {commit}\n")
    assert hub.repositories[NAME].private and len(hub.repositories[NAME].commits) == 2
    assert held(hub) == contents(tmp_path / "out")
    opened, ids = kvtrain.load(NAME, token=READER, revision=commit), random_ids(2, 12)
    again = AutoModelForCausalLM.from_pretrained(snapshot_download(NAME))
    assert type(opened) is type(again) is type(model)
    with torch.no_grad():
        expected = kvtrain.load(tmp_path / "out")(ids).logits
        assert torch.equal(opened(ids).logits, expected) and torch.equal(again.eval()(ids).logits, expected)


def test_a_run_is_exported_and_pushed_and_pushed_again(hub, tmp_path, capsys):
    write_run(tmp_path / "run", kvtrain.DMC(), "kvtrain:tiny")
    out = tmp_path / "out"
    words = ["--push-to", NAME, "--revision", "trial/one"]
    assert main(["export", str(tmp_path / "run"), str(out), *words]) == 0
    commit = hub.repositories[NAME].branches["trial/one"]
    assert capsys.readouterr().out == f"{out}\n{NAME}@trial/one: pushed in commit {commit}\n"
    assert held(hub, "trial/one") == contents(out) and held(hub) == {} and not hub.repositories[NAME].private
    before = pushes(hub)
    assert main(["push", str(out), NAME, "--revision", "trial/one"]) == 0
    assert capsys.readouterr().out == f"{NAME}@trial/one: there already, in commit {commit}\n"
    assert pushes(hub) == before and hub.repositories[NAME].branches["trial/one"] == commit


def test_nothing_of_an_older_model_stays_but_what_others_have_put_there(hub, tmp_path):
    write_folder(tmp_path / "old", "lckv")
    others = {"LICENSE": b"Apache-2.0", "eval.py": b"print()", "figures/tokenizer.json": b"{}", "results.json": b"{}"}
    (tmp_path / "old" / "figures").mkdir()
    for name, data in others.items():
        (tmp_path / "old" / name).write_bytes(data)
    write_folder(tmp_path / "new", "host", shards="20KB")
    (tmp_path / "new" / ".env").write_text(f"HF_TOKEN={WRITER}")
    for folder in ("old", "new"):
        assert main(["push", str(tmp_path / folder), NAME]) == 0
    shards = [path for path in held(hub) if path.startswith("model-")]
    assert len(shards) > 1 and not {"model.safetensors", "modeling_kvtrain.py"} & set(held(hub))
    assert held(hub) == {**contents(tmp_path / "new"), **others}


def test_a_branch_that_moves_meanwhile_is_left_as_it_is(hub, tmp_path, capsys):
    write_folder(tmp_path / "out")
    hub.repositories[NAME] = Repository(private=False)
    hub.repositories[NAME].commit("main", {"README.md": b"one"})

    def interfere(number):
        if "/preupload/" in hub.calls[-1]:
            hub.repositories[NAME].commit("main", {"README.md": b"two"})

    hub.after = interfere
    line = refused(capsys, "push", tmp_path / "out", NAME)
    moved = hub.repositories[NAME].branches["main"]
    assert line.startswith(f"{NAME}@main: not pushed (412 A commit has happened since); somebody else has changed it")
    assert f"the branch is at {moved} now" in line and held(hub) == {"README.md": b"two"}
    hub.after = lambda number: None
    assert main(["push", str(tmp_path / "out"), NAME]) == 0
    assert held(hub) == contents(tmp_path / "out")


@pytest.mark.parametrize("branch", ["main", pytest.param("trial", marks=pytest.mark.roads)])
def test_refused_at_every_request_the_branch_is_the_old_or_the_new(hub, tmp_path, capsys, branch):
    write_folder(tmp_path / "out", shards="30KB")
    number = 0
    while True:
        number += 1
        hub.repositories.clear(), hub.large.clear(), hub.calls.clear()
        hub.before = lambda count, number=number: 403 if count == number else None
        if main(["push", str(tmp_path / "out"), NAME, "--revision", branch]) == 0:
            assert len(hub.calls) == number - 1  # it has had no request to refuse
            break
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"kvtrain: error: {NAME}@{branch}: not pushed (" in line and "403 refused by the test" in line
        assert line.endswith(f"{tmp_path / 'out'} is complete") and WRITER not in line
        assert (NAME in hub.repositories) == ("was made for this push and holds nothing of it" in line), line
        repository = hub.repositories.get(NAME, Repository(private=False))
        assert all(held(hub, name) == {} for name in repository.branches)
        sent = set(hub.large)
        hub.before, hub.calls[:] = lambda count: None, []
        assert main(["push", str(tmp_path / "out"), NAME, "--revision", branch]) == 0
        assert held(hub, branch) == contents(tmp_path / "out")
        assert sent.isdisjoint(call.removeprefix("PUT /lfs/") for call in hub.calls)
    assert number > 12


def break_folder(folder, how):
    """A folder that lacks something, or holds something else."""
    config = json.loads((folder / "config.json").read_text())
    first = min(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    weights = json.loads(index.read_text())
    match how:
        case "noconfig":
            (folder / "config.json").unlink()
        case "badconfig":
            (folder / "config.json").write_text("{")
        case "newmethod":
            (folder / "config.json").write_text(json.dumps({**config, "method_config": {"name": "zip"}}))
        case "newfield":
            config["method_config"]["speed"] = 9
            (folder / "config.json").write_text(json.dumps(config))
        case "newmodel":
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "lllama"}))
        case "noshard":
            first.unlink()
        case "cutshard":
            first.write_bytes(first.read_bytes()[:-7])
        case "emptyshard":
            first.write_bytes(b"")
        case "noindex":
            index.unlink()
        case "badindex":
            index.write_text("[]")
        case "upindex":
            index.write_text(json.dumps({**weights, "weight_map": {"a": f"../{folder.name}/{first.name}"}}))
        case "lostweight":
            index.write_text(json.dumps({**weights, "weight_map": {**weights["weight_map"], "a.weight": first.name}}))
        case "notokenizer":
            for path in folder.glob("tokenizer*"):
                path.unlink()


FOLDERS = {
    "noconfig": "noconfig: no config.json; give a folder that `kvtrain export` has written",
    "badconfig": "no model at 'badconfig'",
    "newmethod": "newmethod: unknown method 'zip'",
    "newfield": "A newer kvtrain may have written this",
    "newmodel": "update kvtrain and transformers if newer ones wrote it",
    "noshard": "model-00001-of-00003.safetensors, which is not there",
    "cutshard": "cutshard/model-00001-of-00003.safetensors: damaged or cut short",
    "emptyshard": "emptyshard/model-00001-of-00003.safetensors: damaged or cut short",
    "noindex": "noindex: neither model.safetensors nor model.safetensors.index.json",
    "badindex": "badindex/model.safetensors.index.json: no index of weights",
    "upindex": "names ../upindex/model-00001-of-00003.safetensors, which is not there",
    "lostweight": "lacks a.weight, which model.safetensors.index.json says is there",
    "notokenizer": "no tokenizer at 'notokenizer'",
}
LINES = [
    ("push", "FOLDER, ORG/NAME is missing"),
    ("push good", "ORG/NAME is missing"),
    ("push good model", "a Hub repository is named org/name, not 'model'"),
    ("push good a/b/c", "a Hub repository is named org/name, not 'a/b/c'"),
    ("push good org/a..b", "a Hub repository is named org/name, not 'org/a..b'"),
    ("push good org/a.git", "a Hub repository is named org/name, not 'org/a.git'"),
    (f"push good org/{'x' * 99}", "a Hub repository is named org/name, not"),
    ("push good org/model --revision 'a b'", "no name of a branch: 'a b'"),
    ("push good org/model --revision ../main", "no name of a branch: '../main'"),
    (f"push good org/model --revision {'0' * 40}", "is a commit, which stays as it is; name a branch"),
    ("push good org/model --revision ''", "option '--revision' needs a value"),
    ("push good org/model --privat", "unknown option '--privat'. Did you mean '--private'?"),
    ("push good org/model extra", "unexpected word 'extra'"),
    ("push nowhere org/model", "nowhere: no config.json"),
    ("push run org/model", "run is a run folder; write its model with `kvtrain export run OUT`"),
    ("push good foreign/model", "403 you have no right to make repositories here); use a token that may write there"),
    ("push good org/open --private", "org/open is there and public, which --private does not change"),
    ("push good org/picky", "org/picky has a .gitignore, by which the Hub leaves files out; nothing was pushed"),
    ("export run out --revision b", "--revision says something about --push-to, which is missing"),
    ("export run out --push-to org/model --revision '*'", "no name of a branch: '*'"),
    *((f"push {name} org/model", words) for name, words in FOLDERS.items()),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders to push, a few of them whole, and a Hub that must stay as it is."""
    folder = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch, local_hub(tmp_path_factory.mktemp("hub")) as hub:
        patch.chdir(folder)
        write_folder(folder / "good", shards="30KB")
        for name in FOLDERS:
            shutil.copytree("good", name)
            break_folder(folder / name, name)
        (folder / "run" / "checkpoints").mkdir(parents=True)
        hub.repositories["org/open"] = Repository(private=False)
        hub.repositories["org/open"].commit("main", {})
        hub.repositories["org/picky"] = Repository(private=False)
        hub.repositories["org/picky"].commit("main", {".gitignore": b"*.safetensors"})
        yield hub


@pytest.mark.parametrize(("line", "words"), LINES, ids=[line[:60] for line, _ in LINES])
def test_a_mistake_is_answered_in_a_line_and_leaves_nothing(place, capsys, line, words):
    before, calls = os.listdir(), len(place.calls)
    assert words in refused(capsys, *shlex.split(line))
    assert os.listdir() == before and set(place.repositories) == {"org/open", "org/picky"} and place.large == {}
    if line.split()[1:2] != ["good"]:
        assert len(place.calls) == calls  # the folder is looked at before the Hub is asked


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "pushing needs a token: run `hf auth login`, or set HF_TOKEN"),
        ("hf_unknown", "401 Invalid credentials in Authorization header); run `hf auth login` again, or set HF_TOKEN"),
        (READER, "403 you have no right to write here); use a token that may write there; the Hub holds what it held"),
    ],
)
def test_who_may_not_push_is_told_so(place, monkeypatch, capsys, token, words):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert words in refused(capsys, "push", "good", "org/open")
    assert set(place.repositories) == {"org/open", "org/picky"} and len(place.repositories["org/open"].commits) == 1


def test_a_full_quota_and_a_hub_that_repeats_the_token(place, monkeypatch, capsys):
    monkeypatch.setattr(place, "before", lambda number: 403 if place.calls[-1].startswith("PUT") else None)
    monkeypatch.setattr(place, "message", f"storage limit of {WRITER} reached")
    line = refused(capsys, "push", "good", "org/open")
    assert "Error while uploading 'model-0" in line and "403 storage limit of *** reached); make room" in line
    assert len(place.repositories["org/open"].commits) == 1


def test_an_answer_that_is_none_of_the_hubs(place, monkeypatch, capsys):
    page = Response("<html>a page of some proxy</html>")
    monkeypatch.setattr(place, "before", lambda number: page if "validate-yaml" in place.calls[-1] else None)
    assert "not pushed (an answer that is not the Hub's); push again" in refused(capsys, "push", "good", "org/open")


def test_an_interruption_says_what_is_where(hub, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    write_folder(tmp_path / "out")
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", interrupt)
    assert main(["push", str(tmp_path / "out"), NAME]) == 130
    line = f"kvtrain: interrupted; the repository {NAME} was made for this push and holds nothing of it"
    assert capsys.readouterr().err.splitlines()[-1] == f"{line}: push again, or remove it"


def test_without_a_network(place, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    line = refused(capsys, "push", "good", "org/open")
    assert "push again when the Hub can be reached; nothing was changed on the Hub" in line


def test_the_local_hub_names_contents_as_git_does():
    assert oid("a.txt", b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
