"""What transformers knows of our classes: by name, by table, and by pickle."""

import copy
import io
import logging
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Trainer, TrainingArguments, pipeline
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import kvtrain
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.models import host as host_module
from kvtrain.models.config import KVTrainConfig
from tests.hosts import FAMILIES, make_host, random_ids

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
TABLES = {
    "CausalLM": CAUSAL,
    "MaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "SequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
METHODS = [
    kvtrain.Full(),
    kvtrain.DMC(),
    kvtrain.LCKV(kv_map="0_1_1_1"),
    kvtrain.Duo(sink=2, recent=4, full_heads=((0,), (1,), (), (0, 1))),
]


@pytest.fixture
def said(monkeypatch):
    """What transformers' pipelines complain of."""
    lines: list[str] = []
    logger = logging.getLogger("transformers.pipelines.base")
    monkeypatch.setattr(logger, "error", lambda text, *_: lines.append(text))
    return lines


@pytest.mark.parametrize("family", FAMILIES)
def test_a_retrofitted_class_is_known_by_its_name(tmp_path, family):
    model = kvtrain.retrofit(make_host(family, dtype=torch.float32), kvtrain.DMC())
    name = type(model).__name__
    assert name in CAUSAL.values()
    assert getattr(host_module, name) is type(model)
    model.save_pretrained(tmp_path)
    opened = getattr(transformers, name).from_pretrained(tmp_path, dtype="auto", device_map="cpu", revision="main")
    assert type(opened) is type(model)
    assert torch.equal(opened(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)


def test_a_model_is_called_after_its_own_folder(tmp_path):
    """PEFT writes the name into its adapters, and opens it as their base: the plain host would be another model."""
    model = kvtrain.retrofit(kvtrain.load("kvtrain:tiny"), kvtrain.DMC())
    assert model.name_or_path == ""
    model.save_pretrained(tmp_path)
    assert kvtrain.load(tmp_path).name_or_path == str(tmp_path)


def test_the_heads_of_a_model_without_a_host_are_known_by_their_names():
    for head, table in TABLES.items():
        assert table["transnormer"] == f"TransNormerFor{head}"
        assert getattr(transformers, f"TransNormerFor{head}").config_class is kvtrain.TransNormerConfig


def test_the_tables_take_no_configuration_from_transformers():
    """It looks for classes under those keys alone of which it has a configuration."""
    ours = {key for table in TABLES.values() for key, name in table.items() if name.startswith(("KV", "TransNormer"))}
    assert {"kvtrain", "transnormer", "kvtrain-llama"} <= ours
    assert not ours & set(CONFIG_MAPPING_NAMES)
    assert CONFIG_MAPPING["kvtrain"] is KVTrainConfig


@pytest.mark.roads
def test_every_configuration_is_still_found():
    """Messages of the ``Auto*`` classes list them all."""
    found = list(AutoModelForCausalLM._model_mapping)
    assert KVTrainConfig in found and kvtrain.TransNormerConfig in found and len(found) > 150


def test_no_class_is_made_up():
    with pytest.raises(AttributeError, match="KVGPT2LMHeadModel"):
        host_module.KVGPT2LMHeadModel  # noqa: B018


def test_label_smoothing_shifts_as_the_host_does(tmp_path):
    host, ids = make_host("llama", dtype=torch.float32).train(), random_ids(2, 12)
    settings = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    model = kvtrain.retrofit(host, kvtrain.Full())
    expected, ours = (
        Trainer(each, settings).compute_loss(each, {"input_ids": ids, "labels": ids.clone()}) for each in (host, model)
    )
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_pipeline_does_not_complain(said):
    model = kvtrain.retrofit(kvtrain.load("kvtrain:tiny"), kvtrain.DMC())
    answer = pipeline("text-generation", model=model, tokenizer=load_tokenizer("kvtrain:tiny"))
    assert said == []
    assert answer("def f(", max_new_tokens=2)[0]["generated_text"].startswith("def f(")
    pipeline("text-classification", model=model, tokenizer=load_tokenizer("kvtrain:tiny"))
    assert len(said) == 1


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_copy_is_the_same_model(duplicate, method):
    model, ids = kvtrain.retrofit(make_host("qwen3", layers=4), method), random_ids(2, 15)
    again = duplicate(model)
    assert type(again) is type(model) and again.method == method
    assert again.lm_head.weight is not model.lm_head.weight
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))


def answer_elsewhere(model, ids):
    """Runs in another process, which has never built such a model."""
    with torch.no_grad():
        return type(model).__name__, model(ids).logits.numpy()


@pytest.mark.roads
def test_a_spawned_worker_gets_the_model():
    model, ids = kvtrain.retrofit(make_host("mistral"), kvtrain.DMC()), random_ids(2, 15)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        name, logits = pool.submit(answer_elsewhere, model, ids).result(timeout=120)
    assert name == "KVMistralForCausalLM"
    torch.testing.assert_close(torch.from_numpy(logits), model(ids).logits.detach(), atol=1e-12, rtol=0)
