"""The model card: where the model comes from, what it takes, and nothing that was guessed or that nobody should see."""

import pytest
import yaml

import kvtrain
from kvtrain.export.card import model_card
from kvtrain.export.provenance import base_license, read_provenance
from kvtrain.models.cache_size import cache_bytes, host_kv_bytes
from tests.hosts import make_host

PHASES = [{"name": "zero_out", "steps": 10, "learning_rate": 3e-5}, {"name": "retrofit", "steps": 1200}]
ROWS = "step,loss,val_loss,val_perplexity,val_compression\n9,2.5,,,\n19,2.25,2.0,7.389,3.9\n29,2.125,,,\n"


def write_run(folder, base="org/base-7b", corpus="hf:org/text:part", **data):
    model = {"base": base, "phases": PHASES}
    recipe = {"model": {"class_path": "DMCModule", "init_args": model}, "data": {"corpus": corpus, **data}}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "metrics.csv").write_text(ROWS)
    return folder


def card_of(model, run):
    return model_card(model, run.name, read_provenance(run))


def front_matter(card):
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


@pytest.fixture
def model():
    return kvtrain.retrofit(make_host(layers=2), kvtrain.DMC(compression=4.0))


def test_base_text_steps_and_figures(model, tmp_path):
    card = card_of(model, write_run(tmp_path / "my-run", sequence_length=4096))
    matter = front_matter(card)
    assert matter["base_model"] == "org/base-7b" and matter["datasets"] == ["org/text"]
    assert matter["library_name"] == "kvtrain" and matter["tags"] == ["kvtrain", "dmc"]
    for line in (
        "| base | `org/base-7b` |",
        "| text | `hf:org/text:part`, rows of 4,096 tokens |",
        "| steps (learning rate) | zero_out 10 (3e-05), retrofit 1,200 |",
        "| held-out perplexity at step 20 | 7.389 |",
        "| held-out compression at step 20 | 3.9 |",
    ):
        assert line in card.splitlines(), card


def test_bytes_at_1024_tokens_and_at_the_trained_length(model, tmp_path):
    card, config = card_of(model, write_run(tmp_path / "run", sequence_length=4096)), model.config
    for tokens in (1024, 4096):
        plain = host_kv_bytes(config.host_config, tokens)
        held = cache_bytes(config.host_config, config.method, tokens)
        assert f"| {tokens:,} | {plain:,} | {held:,} | {plain / held:.2f} |" in card.splitlines()
    assert "tokens takes more than the host's" in card


def test_full_says_that_it_takes_more(tmp_path):
    model = kvtrain.retrofit(make_host(layers=2), kvtrain.Full())
    card = " ".join(card_of(model, write_run(tmp_path / "run")).split())
    assert "A row takes more than the host's, at least up to 1,024 tokens." in card


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: llama2\n---\n# Base\n", "llama2"),
        ("# A card without any\n", None),
        ("---\nlicense: [\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_what_the_base_s_card_names(model, tmp_path, text, license, caplog):
    base = tmp_path / "secret-place" / "base"
    base.mkdir(parents=True)
    if text is not None:
        (base / "README.md").write_text(text)
    assert base_license(str(base)) == license
    assert caplog.messages == []  # of the Hub's reader, which says that a card has no metadata
    card = card_of(model, write_run(tmp_path / "run", base=str(base), corpus=str(tmp_path / "corpus.jsonl")))
    assert front_matter(card).get("license") == license
    assert ("unknown: the base's card names none" in card) == (license is None)
    assert "secret-place" not in card and "`base`" in card and "`corpus.jsonl`" in card
    assert "base_model" not in front_matter(card)


@pytest.mark.parametrize("content", ["", "model: [1, 2]\ndata: 3\n", "model: {base: 7, phases: {a: 1}}\n", "a: [\n"])
def test_a_run_that_tells_nothing_makes_no_card_fail(model, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(content)
    card = card_of(model, tmp_path / "run")
    assert "| base |" not in card and "| 1,024 |" in card


def test_a_plain_host_has_no_table_of_bytes(tmp_path):
    card = card_of(make_host(layers=2), write_run(tmp_path / "run"))
    assert front_matter(card)["library_name"] == "transformers" and "times fewer" not in card
