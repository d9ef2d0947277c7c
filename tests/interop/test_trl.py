"""TRL's trainers: supervised tuning on packed rows, preferences, and learning from samples of its own."""

import copy

import pytest
import torch
from datasets import Dataset

import kvtrain
from kvtrain.data.tokenizer import load_tokenizer
from tests.caches import CACHES
from tests.hosts import make_host

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.roads

TEXTS = [
    "import os",
    "def f(x):\n    return x + 1\n",
    "for i in range(10):\n    print(i)\n",
    "class A:\n    pass\n",
] * 2
COMMON = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer("kvtrain:tiny")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def host_of(layers=2):
    return make_host(dtype=torch.float32, layers=layers, vocab_size=4096)


def sft_loss(model, tokenizer, folder, **options):
    """Logged loss of one step over all texts."""
    arguments = trl.SFTConfig(output_dir=str(folder), **{**COMMON, "max_length": 64, **options})
    data = Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    losses = []
    compute = trainer.compute_loss

    def record(*args, **kwargs):
        loss = compute(*args, **kwargs)
        losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss

    trainer.compute_loss = record
    trainer.train()
    return losses[0]


@pytest.mark.parametrize(
    "options", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=["packing", "padding_free"]
)
def test_packed_rows_have_the_hosts_loss(options, tokenizer, tmp_path):
    """The host keeps documents apart by their positions."""
    host = host_of()
    expected = sft_loss(host, tokenizer, tmp_path, **options)
    model = kvtrain.retrofit(host, kvtrain.Full())
    assert sft_loss(model, tokenizer, tmp_path, **options) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["dmc", "lckv", "duo", "transnormer_t2"])
def test_packing_is_no_packing(name, tokenizer, tmp_path):
    """The same texts in one row and in rows of their own."""
    model = CACHES[name].retrofit(host_of(CACHES[name].layers))
    if hasattr(model.config, "hidden_dropout"):
        model.config.hidden_dropout = 0.0
        for layer in model.model.layers:
            layer.dropout = 0.0
    every = {"per_device_train_batch_size": len(TEXTS)}
    apart = sft_loss(model, tokenizer, tmp_path, **every)
    together = sft_loss(model, tokenizer, tmp_path, padding_free=True, max_length=None, **every)
    assert together == pytest.approx(apart, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "tolerance"), [(kvtrain.Full(), 1e-4), (kvtrain.DMC(init_bias=0.0), 0.02)], ids=["full", "dmc"]
)
def test_preferences(method, tolerance, tokenizer, tmp_path):
    """A step of DPO, whose loss at equal models is log 2; DMC's decisions are soft in the one that trains."""
    rows = {"prompt": ["import os"] * 4, "chosen": ["\nimport sys\n"] * 4, "rejected": ["\nprint(1)\n"] * 4}
    arguments = trl.DPOConfig(output_dir=str(tmp_path), max_length=64, **COMMON)
    model = kvtrain.retrofit(host_of(), method)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [pytest.approx(0.6931, abs=tolerance)]


@pytest.mark.parametrize("method", [kvtrain.Full(), kvtrain.DMC(init_bias=0.0)], ids=lambda m: m.name)
def test_learning_from_samples(method, tokenizer, tmp_path):
    """GRPO generates in train mode."""
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), num_generations=2, max_completion_length=8, **{**COMMON, "learning_rate": 1e-3}
    )
    model = kvtrain.retrofit(host_of(), method)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = trl.GRPOTrainer(
        model=model,
        args=arguments,
        reward_funcs=lambda completions, **_: [float(number) for number, _ in enumerate(completions)],
        train_dataset=Dataset.from_dict({"prompt": ["import os"] * 4}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
