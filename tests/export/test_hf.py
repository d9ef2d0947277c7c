"""A checkpoint becomes a Hugging Face folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

import kvtrain
from kvtrain.export.hf import export_run
from kvtrain.models.config import CHECKPOINT_KEY
from kvtrain.models.portable import SHIM
from kvtrain.models.weights import map_weights
from tests.hosts import make_host, random_ids

# Of four layers: one that iterates and owns nothing; and maps that read from below, keys and values apart or mixed.
METHODS = [
    kvtrain.DMC(compression=3.0, window=7),
    kvtrain.LCKV(kv_map="0_2_2_3", forward_passes=2, prefill_block=8),
    kvtrain.LCKV(kv_map="0_1_1_1", value_map="first", residual=True),
    kvtrain.LCKV(kv_map="plain", init="mean"),
    kvtrain.Full(),
]


# Of hosts with experts, one whose files call them otherwise.
HOSTS = [*(("qwen3", method) for method in METHODS), ("mixtral", METHODS[0]), ("mixtral", METHODS[-1])]


def name_of(method):
    return f"{method.name}-{method.kv_map}" if method.name == "lckv" else method.name


def card_of(folder):
    """The model card, its line breaks gone."""
    return " ".join((folder / "README.md").read_text().split())


def write_run(folder, method, tokenizer=None, change=lambda settings: None, family="qwen3", **host):
    """A run folder with a checkpoint such as training writes."""
    host = {"layers": 4} | host
    model = kvtrain.retrofit(make_host(family, dtype=torch.float32, **host), method)
    settings = {"config": json.loads(model.config.to_json_string(use_diff=False)), "tokenizer": tokenizer}
    change(settings)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state, CHECKPOINT_KEY: json.dumps(settings)}, folder / "checkpoints" / "last.ckpt")
    return model


@pytest.mark.parametrize(("own", "ends"), [(None, [9]), (2, [2, 9]), ([3, 2], [3, 2, 9]), (9, 9)])
def test_answers_end_at_the_stop_token_of_the_chats_too(tmp_path, own, ends):
    def change(settings):
        settings["stop_token_id"] = 9
        settings["config"]["text_config"]["eos_token_id"] = own

    write_run(tmp_path / "run", kvtrain.Full(), change=change)
    folder = export_run(tmp_path / "run", tmp_path / "out")
    assert kvtrain.load(str(folder)).generation_config.eos_token_id == ends


@pytest.mark.parametrize(("family", "method"), HOSTS, ids=[f"{family}-{name_of(method)}" for family, method in HOSTS])
def test_what_comes_out_computes_what_went_in(tmp_path, family, method):
    trained = write_run(tmp_path / "run", method, family=family, tie_word_embeddings=True)
    ids, greedy = random_ids(2, 20), {"max_new_tokens": 5, "do_sample": False}
    folder = export_run(tmp_path / "run", tmp_path / "out", dtype="float32")
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert opened.num_parameters() == trained.num_parameters()
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, trained(ids).logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(opened.generate(ids, **greedy), trained.generate(ids, **greedy))
    if method.name == "full":
        assert type(trained).__name__ == f"KV{type(opened).__name__}"
        written = json.loads((folder / "config.json").read_text())
        assert written["model_type"] == family and "auto_map" not in written and not list(folder.glob("*.py"))
        opened.save_pretrained(tmp_path / "again")
        assert map_weights(str(folder)).keys() == map_weights(str(tmp_path / "again")).keys()
    else:
        assert type(opened) is type(trained) and opened.method == method
        assert (folder / SHIM.name).is_file()
    half = AutoModelForCausalLM.from_pretrained(export_run(tmp_path / "run", tmp_path / "half"), dtype="auto")
    assert half.dtype == torch.bfloat16


def test_card_and_tokenizer(tmp_path):
    write_run(tmp_path / "my-run", kvtrain.DMC(compression=3.0), "kvtrain:tiny")
    folder = export_run(tmp_path / "my-run", tmp_path / "out")
    card = card_of(folder)
    for part in ("# my-run", "library_name: kvtrain", "import kvtrain", '"compression": 3.0', "uncompressed cache"):
        assert part in card, part
    assert "open this folder with `trust_remote_code=True`" in card and "transformers serve" in card
    assert (folder / "tokenizer.json").is_file()
    assert not list(folder.glob("*.bin")) and list(folder.glob("*.safetensors"))


@pytest.mark.parametrize("method", METHODS[:-1], ids=name_of)
def test_the_card_says_what_the_hosts_own_class_makes_of_the_folder(tmp_path, method):
    """The trained weights, where they are all there; else a host that is partly random."""
    trained = write_run(tmp_path / "run", method, tie_word_embeddings=True)
    folder = export_run(tmp_path / "run", tmp_path / "out", dtype="float32")
    host, found = Qwen3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    missing, card = found["missing_keys"], card_of(folder)
    assert ("it runs the trained weights that it knows" in card) == (not missing)
    assert (f": {len(missing)} of the host's parameters are not in this folder" in card) == bool(missing)
    weights = dict(trained.named_parameters())
    for name, parameter in host.named_parameters():
        assert name in missing or torch.equal(parameter, weights[name]), name


def test_mistakes_are_one_line_and_leave_nothing(tmp_path):
    write_run(tmp_path / "run", kvtrain.DMC())
    (tmp_path / "taken").mkdir()
    (tmp_path / "damaged.ckpt").write_bytes(b"no checkpoint at all")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "sharded" / "checkpoints" / "step-000001.ckpt").mkdir(parents=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    for run, output, options, message in (
        ("none", "out", {}, "no checkpoint"),
        ("run", "taken", {}, "exists already"),
        ("run", "out", {"dtype": "int8"}, "dtype must be one of"),
        ("damaged.ckpt", "out", {}, "damaged or no checkpoint of kvtrain"),
        ("foreign.ckpt", "out", {}, "not a checkpoint of"),
        ("sharded", "out", {}, "a folder that is no checkpoint"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            export_run(tmp_path / run, tmp_path / output, **options)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_pickled_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"state_dict": {}, CHECKPOINT_KEY: "{}", "bomb": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        export_run(tmp_path / "bomb.ckpt", tmp_path / "out")
    assert not (tmp_path / "exploded").exists()
