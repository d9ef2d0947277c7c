"""``--method``: a method as text, put into a plain model wherever one is opened, and nowhere else."""

import json

import pytest
import torch

import kvtrain
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.inference.engine import Request
from kvtrain.inference.load import open_model
from kvtrain.inference.server.options import ServeOptions, add_engine_arguments
from kvtrain.models.parse_method import method_text, parse_method
from kvtrain.parser import Parser
from kvtrain_cli import main


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("H2O(budget=256, recent=128)", kvtrain.H2O(budget=256, recent=128)),
        (" SnapKV ( budget = 0.25 , kernel = 7 )\n", kvtrain.SnapKV(budget=0.25, kernel=7)),
        ("TOVA(budget=64, prompt='blocks')", kvtrain.TOVA(budget=64, prompt="blocks")),
        ("Full()", kvtrain.Full()),
        ("Full(kv_bits=4)", kvtrain.Full(kv_bits=4)),
        ("Full(kv_bits=None)", kvtrain.Full()),
        ("Duo(full_heads=[[0], [], [1, 2], (3,)], sink=4)", kvtrain.Duo(full_heads=[[0], [], [1, 2], [3]], sink=4)),
        ("DMC(compression=8)", kvtrain.DMC(compression=8)),
    ],
)
def test_it_is_read_as_python_reads_it(text, method):
    assert parse_method(text) == method == parse_method(method_text(method))


def test_it_is_written_without_what_goes_without_saying():
    assert method_text(kvtrain.H2O(budget=128, page_size=32)) == "H2O(budget=128)"


@pytest.mark.parametrize("prompt", ["blocks", "dense"])
def test_an_opened_model_is_the_retrofit_of_what_is_loaded(prompt):
    method = kvtrain.H2O(budget=16, recent=8, prompt=prompt)
    opened, _ = open_model("kvtrain:copy", method=method)
    by_hand = kvtrain.retrofit(kvtrain.load("kvtrain:copy"), method).eval()
    ids = torch.arange(5, 65)[None]
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, by_hand(ids).logits)
    assert opened.method == method and not opened.training


def test_what_has_a_method_takes_no_other(tmp_path):
    kvtrain.retrofit(kvtrain.load("kvtrain:copy"), kvtrain.DMC()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a KVLlamaForCausalLM already; a method is given to a plain model"):
        open_model(tmp_path, method=kvtrain.Full())


def test_generate_keeps_what_the_policy_keeps(capsys):
    words = ["generate", "kvtrain:copy", "--prompt", "alpha bravo charlie delta echo " * 8, "--max-new-tokens", "8"]
    assert main([*words, "--method", "StreamingLLM(budget=16, recent=12, sink=4)"]) == 0
    assert "kept 16 of " in capsys.readouterr().err


@pytest.mark.parametrize("method", ["H2O(budget=16, recent=8)", "Duo(full_heads=[[0], [1], [2], [3]], recent=8)"])
def test_an_export_opens_with_its_method(tmp_path, method, capsys):
    out = tmp_path / "out"
    assert main(["export", "kvtrain:copy", str(out), "--method", method, "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    opened, tokenizer = open_model(out)
    assert opened.method == parse_method(method) and tokenizer.is_fast
    ids = torch.arange(5, 65)[None]
    expected, _ = open_model("kvtrain:copy", method=parse_method(method), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, expected(ids).logits)
    assert not opened.generation_config.do_sample
    card = (out / "README.md").read_text()
    assert card.count("# out\n") == 1 and "| base | `kvtrain:copy` |" in card


def said(tmp_path, *words):
    """What eval writes of a model's method."""
    ask = ["--tasks", "continuation,passkey", "--ask", "after", "--passkeys", "1", "--words", "2"]
    ask += ["--sequence-length", "96", "--limit", "1", "--json", str(tmp_path / "j.json")]
    assert main(["eval", *words, *ask]) == 0
    rows = json.loads((tmp_path / "j.json").read_text())
    assert {(row["method"], row["trained"]) for row in rows} == {(rows[0]["method"], rows[0]["trained"])}
    return rows[0]["method"], rows[0]["trained"], [row["measured_on"] for row in rows]


def test_eval_says_what_it_measured_and_whether_that_was_trained(tmp_path):
    duo = "Duo(sink=4, recent=8, full_heads=[[0], [1], [2], [3]])"
    assert main(["export", "kvtrain:copy", str(tmp_path / "put in"), "--method", duo]) == 0
    kvtrain.retrofit(kvtrain.load("kvtrain:copy"), parse_method(duo)).save_pretrained(tmp_path / "learnt")
    load_tokenizer("kvtrain:copy").save_pretrained(tmp_path / "learnt")
    method, trained, measured = said(tmp_path, str(tmp_path / "put in"))
    assert (parse_method(method), trained) == (parse_method(duo), False)
    assert said(tmp_path, str(tmp_path / "learnt"))[:2] == (method, True)
    assert said(tmp_path, "kvtrain:copy", "--method", duo) == (method, False, measured)
    assert said(tmp_path, "kvtrain:copy")[:2] == ("Full()", False)
    common = {"corpus": "heldout", "sequence_length": 96, "limit": 1, "tokenizer": measured[0]["tokenizer"]}
    assert measured[0] == {**common, "prompt": 72}
    asked = {"ask": "after", "chunk": None, "passkeys": 1, "words": 2, "supervision": "passkey"}
    assert measured[1] == {**common, **asked}


def test_an_export_of_full_is_the_plain_model(tmp_path):
    assert main(["export", "kvtrain:copy", str(tmp_path / "out"), "--method", "Full()"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_an_export_takes_plain_models_alone(tmp_path, capsys):
    kvtrain.retrofit(kvtrain.load("kvtrain:copy"), kvtrain.DMC()).save_pretrained(tmp_path / "dmc")
    assert main(["export", str(tmp_path / "dmc"), str(tmp_path / "out"), "--method", "Full()"]) == 2
    assert "dmc is of type kvtrain already; a method is given to a plain model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_server_keeps_what_the_policy_keeps():
    parser = Parser("serve")
    add_engine_arguments(parser)
    words = ["kvtrain:copy", "--method", "StreamingLLM(budget=16, recent=12, sink=4)", "--budget", "16MiB"]
    engine = ServeOptions.read(parser.parse_args(words)).open_engine()
    try:
        (answer,) = engine.generate(Request(range(5, 65), max_new_tokens=6, ignore_eos=True))
    finally:
        engine.close()
    assert answer.finish.usage.seen_tokens == 65 and answer.finish.usage.kept_tokens == 16
