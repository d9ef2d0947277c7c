"""From a Hub to somebody who has torch and transformers alone: pushed with its code, opened at the commit."""

import json

import pytest
import torch

from kvtrain.data.tokenizer import load_tokenizer
from kvtrain_cli import main
from tests.caches import MAIN
from tests.export.test_remote_code import HEADS, assert_alone, assert_opens, cached, prepare, read, transnormer
from tests.hosts import make_host
from tests.hub.client import local_hub
from tests.hub.server import READER


def models():
    """Every method, TransNormer's heads, and a plain host, each with how it is opened."""
    found = {name: (cached(name), "CausalLM") for name in MAIN}
    found |= {f"transnormer-{head.lower()}": (transnormer(head), head) for head in HEADS}
    return {**found, "host": (make_host("llama", dtype=torch.float32), "CausalLM")}


@pytest.mark.roads
def test_what_was_pushed_with_its_code_opens_at_its_commit(tmp_path):
    """By one process, from private repositories, to the last bit."""
    prepared = {}
    with local_hub(tmp_path) as hub:
        for name, (model, head) in models().items():
            folder, question = tmp_path / "out" / name, tmp_path / name
            _, expected = prepare(folder, model, head, repository=f"org/{name}")
            load_tokenizer("kvtrain:tiny").save_pretrained(folder)
            question.mkdir()
            for path in folder.glob("asked.*"):
                path.rename(question / path.name)
            assert main(["push", str(folder), f"org/{name}", "--private"]) == 0
            repository = hub.repositories[f"org/{name}"]
            commit = repository.branches["main"]
            assert {path.name for path in folder.iterdir()} <= repository.commits[commit].keys()
            asked = {**json.loads((question / "asked.json").read_text()), "revision": commit}
            (question / "asked.json").write_text(json.dumps(asked))
            prepared[name] = (question, model, expected)
        place = {"HF_ENDPOINT": hub.address, "HF_TOKEN": READER, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        told = read([question for question, _, _ in prepared.values()], tmp_path, **place)
    assert_alone(told)
    for name, (question, model, expected) in prepared.items():
        assert_opens(told, question, model, expected, plain=name == "host")
