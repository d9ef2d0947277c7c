"""Folders that open without ``import kvtrain``: what travels in them, what runs, and what does not."""

import ast
import json
import shutil
import sys

import pytest
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    dynamic_module_utils,
    pipeline,
)
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.auto import modeling_auto

import kvtrain
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.export.remote_code import write_remote_code
from kvtrain.models.portable import SHIM
from tests.hosts import make_host, random_ids

HEADS = {
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForMaskedLM: modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def modules():
    return [name for name in sys.modules if name.partition(".")[0] == "kvtrain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer."""
    path = tmp_path_factory.mktemp("portable") / "tiny-dmc"
    kvtrain.retrofit(kvtrain.load("kvtrain:tiny"), kvtrain.DMC()).save_pretrained(path)
    load_tokenizer("kvtrain:tiny").save_pretrained(path)
    return path


@pytest.fixture
def coded(folder, tmp_path):
    """The same with the model's code, of which no file may be run but the one that ``config.json`` names."""
    shutil.copytree(folder, tmp_path / "coded")
    for path in write_remote_code(tmp_path / "coded", AutoConfig.from_pretrained(folder)):
        if path.name != SHIM.name:
            path.write_text(f"raise AssertionError('{path.name} was run')\n")
    return tmp_path / "coded"


@pytest.fixture
def stranger(monkeypatch, tmp_path):
    """transformers as it is where nobody has imported kvtrain."""
    for name in modules():
        monkeypatch.delitem(sys.modules, name)
    for mapping in (CONFIG_MAPPING, *(auto._model_mapping for auto in HEADS)):
        monkeypatch.setattr(mapping, "_extra_content", {})
    for table in HEADS.values():
        for model_type in [key for key in table if key.startswith(("kvtrain", "transnormer"))]:
            name = table[model_type]
            monkeypatch.delitem(table, model_type)
            monkeypatch.delattr(type(transformers), name)
    for interface in (AttentionInterface, AttentionMaskInterface, ExpertsInterface):  # a second kvtrain enters its own
        monkeypatch.setattr(interface, "_global_mapping", {**interface._global_mapping})
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in modules():  # those that were there come back
        del sys.modules[name]


def plant(folder, path):
    """Code in a folder, which leaves a trace when it runs."""
    (folder / SHIM.name).write_text(f"open({str(path)!r}, 'w')\n{SHIM.read_text()}")


def test_the_file_imports_kvtrain_and_nothing_else():
    tree = ast.parse(SHIM.read_text())
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports == ["from kvtrain.models.auto import class_by_name"]
    assert dynamic_module_utils.check_imports(SHIM) == []


def test_a_saved_model_names_the_file_and_carries_it(tmp_path):
    model = kvtrain.retrofit(make_host("qwen3", dtype=torch.float32), kvtrain.DMC())
    model.save_pretrained(tmp_path / "one")
    kvtrain.load(tmp_path / "one").save_pretrained(tmp_path / "two")
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert (folder / "modeling_kvtrain.py").read_bytes() == SHIM.read_bytes()
        assert [path.name for path in folder.glob("*.py")] == ["modeling_kvtrain.py"]
        assert json.loads((folder / "config.json").read_text())["auto_map"] == {
            "AutoConfig": "modeling_kvtrain.KVTrainConfig",
            "AutoModelForCausalLM": "modeling_kvtrain.KVTrainForCausalLM",
        }


def test_importing_kvtrain_runs_nothing_from_a_folder(tmp_path):
    model = kvtrain.retrofit(make_host("llama", dtype=torch.float32), kvtrain.Full())
    model.save_pretrained(tmp_path / "saved")
    plant(tmp_path / "saved", tmp_path / "ran")
    for trust in (None, False, True):
        assert type(AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=trust)) is type(model.config)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=trust)
        assert type(opened) is type(model)
    assert type(kvtrain.load(tmp_path / "saved")) is type(model)
    assert not (tmp_path / "ran").exists()


def test_nothing_runs_unless_it_is_asked_for(stranger, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    plant(tmp_path / "copy", tmp_path / "ran")
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            auto.from_pretrained(tmp_path / "copy", trust_remote_code=False)
    assert not (tmp_path / "ran").exists() and not modules()
    AutoConfig.from_pretrained(tmp_path / "copy", trust_remote_code=True)
    assert (tmp_path / "ran").exists() and modules()


def test_without_kvtrain_one_line_says_what_to_do(stranger, folder, monkeypatch):
    class Absent:
        @staticmethod
        def find_spec(name, *_):
            if name == "kvtrain":
                raise ModuleNotFoundError("No module named 'kvtrain'", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(ImportError, match=r"^this model needs kvtrain; run `pip install kvtrain` and open it again$"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_trusted_folders_open_as_the_models_that_they_are(stranger, folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "kvtrain" and config.method.name == "dmc"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    named = getattr(transformers, config.architectures[0]).from_pretrained(folder, trust_remote_code=True)
    answer = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    assert [type(each).__name__ for each in (model, named, answer.model)] == ["KVLlamaForCausalLM"] * 3
    ids = load_tokenizer("kvtrain:tiny")("def f(", return_tensors="pt").input_ids
    cache = model(ids, use_cache=True).past_key_values
    assert type(cache).__name__ == "KVCache"
    said = answer("def f(", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert said.startswith("def f(") and len(said) > len("def f(")


def test_code_in_a_folder_gives_way_to_an_installed_kvtrain(coded, stranger, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(coded, trust_remote_code=True)
    assert type(model).__module__ == "kvtrain.models.host" and modules()
    model.save_pretrained(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == ["modeling_kvtrain.py"]
    assert (tmp_path / "again" / SHIM.name).read_bytes() == SHIM.read_bytes()


def test_what_was_opened_can_be_saved_and_opened_again(stranger, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == ["modeling_kvtrain.py"]
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert after == before


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_every_head_opens_where_it_applies(request, tmp_path, auto):
    causal = auto is AutoModelForCausalLM
    kind = "Causal" if causal else "Masked"
    model = auto.from_config(kvtrain.TransNormerConfig(**SIZES, causal=causal)).eval()
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert sorted(written) == ["AutoConfig", f"AutoModelFor{kind}LM", "AutoModelForSequenceClassification"]
    assert written[auto.__name__] == f"modeling_kvtrain.{type(model).__name__}"
    expected = model(random_ids(1, 12) % 40).logits
    request.getfixturevalue("stranger")
    opened = auto.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(opened).__name__ == type(model).__name__
    assert torch.equal(opened(random_ids(1, 12) % 40).logits, expected)
    refused = AutoModelForMaskedLM if causal else AutoModelForCausalLM
    with pytest.raises(ValueError, match="causal="):
        refused.from_pretrained(tmp_path / "saved", trust_remote_code=True)
