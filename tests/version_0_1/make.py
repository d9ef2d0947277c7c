"""How the files beside this one were made, by kvtrain 0.1: a record, not a tool of later versions.

    python -m tests.version_0_1.make FOLDER

``folders/``
    A model of each architecture and form as ``save_pretrained`` writes it.
``place/``
    Where runs took place: a base model, a prepared corpus, and a run folder of each training module that was stopped
    after two of four steps. Every path in a ``config.yaml`` is relative to this folder.
``expected/``
    What the models and the exported runs compute, and the losses of each run's third and fourth step, nothing having
    stopped it.
``digests.json``
    SHA-256 of all of these. They are evidence: nobody edits them, whatever is renamed.

A run goes on in a copy of ``place/`` as the current directory:
``kvtrain fit --config dmc/config.yaml --ckpt_path last --trainer.max_steps 4``.
"""

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvtrain
from kvtrain.cli import main
from kvtrain.data.shards import ShardWriter
from tests.hosts import FAMILIES
from tests.version_0_1.measure import DIGESTS, EXPECTED, FOLDERS, PLACE, as_json, digests, fit, measure

VOCAB, LENGTH, PADDING = 64, 14, 5
TOLERANCE, DISTURBANCES = 1e-5, 8
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "tie_word_embeddings": True,
    "sliding_window": None,
    **SPECIAL,
}


def vary(model: PreTrainedModel) -> PreTrainedModel:
    """Random biases and norms, and projections that make attention and decisions differ from token to token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "k_proj" in name or "q_proj" in name:
                parameter.mul_(10)
            elif parameter.dim() > 1:
                parameter.mul_(3)  # logits far apart: greedy tokens that rounding does not change
    return model.eval()


def host(family: str, layers: int = 2) -> PreTrainedModel:
    """A host with random weights."""
    torch.manual_seed(0)
    config = FAMILIES[family](**{**SIZES, "num_hidden_layers": layers})
    return vary(AutoModelForCausalLM.from_config(config))


def retrofitted(method: Any, family: str, layers: int = 2) -> PreTrainedModel:
    """A host with a method in it; what is a method's own becomes random too."""
    model = kvtrain.retrofit(host(family, layers), method)
    known = set(host(family, layers).state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in known:
                parameter.copy_(torch.rand_like(parameter))
    return model.eval()


def rounded(method: Any, family: str) -> PreTrainedModel:
    """Gates as after training, then rounded: half of the heads are full."""
    model = retrofitted(method, family)
    model.binarise(0.5)
    return model.eval()


def transnormer(head: str = "CausalLM", **settings: Any) -> PreTrainedModel:
    """A TransNormer; statistics of its batches are those of one batch."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 32, "block_size": 5}
    torch.manual_seed(0)
    model = getattr(kvtrain, f"TransNormerFor{head}")(kvtrain.TransNormerConfig(**sizes, **SPECIAL, **settings))
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d)):
        norm.momentum = 1.0
    model.train()(inputs()["input_ids"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("theta"):
                parameter.mul_(1.01)
    return model.eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "full": lambda: retrofitted(kvtrain.Full(), "olmo2"),
    "full_8_bits": lambda: retrofitted(kvtrain.Full(kv_bits=8), "qwen3"),
    "dmc": lambda: retrofitted(kvtrain.DMC(compression=2.0, window=4, init_bias=0.0, page_size=4), "qwen3"),
    "dmc_shared": lambda: retrofitted(kvtrain.DMC(init_bias=0.0, page_size=4, shared_decisions=True), "llama"),
    "duo_gates": lambda: retrofitted(kvtrain.Duo(sink=2, recent=4), "mistral"),
    "duo_hard_concrete": lambda: retrofitted(kvtrain.Duo(sink=2, recent=4, gates="hard_concrete"), "llama"),
    "duo_rounded": lambda: rounded(kvtrain.Duo(sink=2, recent=4, page_size=4), "mistral"),
    "duo_compensated_4_bits": lambda: rounded(
        kvtrain.Duo(sink=2, recent=4, page_size=4, compensation=True, kv_bits=4), "qwen2"
    ),
    "lckv": lambda: retrofitted(
        kvtrain.LCKV(kv_map="0_2_2_3", forward_passes=2, prefill_block=8, page_size=4), "llama", 4
    ),
    "lckv_below": lambda: retrofitted(
        kvtrain.LCKV(kv_map="0_1_1", value_map="first", residual=True, page_size=4), "qwen3", 3
    ),
    "lckv_sliding": lambda: retrofitted(
        kvtrain.LCKV(kv_map="0s_2s_2s", sliding_window=5, forward_passes=1, page_size=4), "mistral", 3
    ),
    "transnormer_t1": lambda: transnormer(variant="T1", num_block_heads=4, decay="released"),
    "transnormer_t2": lambda: transnormer(variant="T2"),
    "transnormer_masked": lambda: transnormer(
        "MaskedLM", causal=False, pre_norm=False, position_embedding="learned", embedding_norm=True
    ),
    "transnormer_classifier": lambda: transnormer(
        "SequenceClassification", causal=False, norm="batch", num_labels=3, tie_word_embeddings=False
    ),
}


def inputs() -> dict[str, Tensor]:
    """Two rows, the second padded on the left."""
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :PADDING] = mask[1, :PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


def disturbed(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The same model, every weight changed by about one unit in its last place."""
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=generator))
    return other


def record(name: str, model: PreTrainedModel, **more: Tensor) -> None:
    """Write what a model computes, once it is known that another machine's rounding changes nothing of it."""
    told = inputs()
    found = measure(model, told)
    for seed in range(DISTURBANCES):
        other = measure(disturbed(model, seed), told)
        torch.testing.assert_close(other.pop("logits"), found["logits"], atol=TOLERANCE, rtol=0, msg=name)
        assert all(torch.equal(tensor, found[key]) for key, tensor in other.items()), name
    save_file({**told, **found, **more}, f"{EXPECTED}/{name}.safetensors")


# The option names of version 0.1, one recipe a training module.
PHASE = {"learning_rate": 0.01, "warmup_steps": 0}
MODULES: dict[str, dict[str, Any]] = {
    "dmc": {
        "class_path": "kvtrain.training.DMCModule",
        "init_args": {
            "base": "base",
            "method": {"compression": 2.0, "window": 4, "init_bias": 1.0, "page_size": 4},
            "phases": [{"name": "zero_out", "steps": 1, **PHASE}, {"name": "retrofit", "steps": 4, **PHASE}],
        },
    },
    "duo": {
        "class_path": "kvtrain.training.DuoModule",
        "init_args": {
            "base": "base",
            "method": {"sink": 2, "recent": 4, "mixing": "self", "gates": "plain", "sparsity": 0.5},
            "distill": {"of": "hidden"},
            "regularisation": 0.1,
            "phases": [{"name": "gates", "steps": 5, **PHASE, "learning_rate": 0.2}],
        },
    },
    "lckv": {
        "class_path": "kvtrain.training.LCKVModule",
        "init_args": {
            "base": "base",
            "method": {"kv_map": "0_2_2_3", "forward_passes": 2, "init": "mean", "page_size": 4},
            "distill": True,
            "phases": [{"name": "train", "steps": 5, **PHASE}],
        },
    },
    "transnormer": {
        "class_path": "kvtrain.training.TransNormerModule",
        "init_args": {
            "config": {
                "variant": "T1",
                "vocab_size": VOCAB,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "block_size": 5,
                "initialisation": "normal",
                **SPECIAL,
            },
            "phases": [{"name": "pretrain", "steps": 5, **PHASE}],
        },
    },
}


def recipe(module: dict[str, Any]) -> dict[str, Any]:
    """A recipe of four steps, two micro-batches each."""
    module["init_args"] |= {"weight_decay": 0.1, "seed": 3}
    trainer = {
        "max_steps": 4,
        "accelerator": "cpu",
        "devices": 1,
        "num_threads": 1,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "val_check_interval": 100,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "checkpoint_every": 5,
    }
    corpora = {"tokenizer": None, "corpus": "corpus", "validation_corpus": "corpus"}
    data = {**corpora, "sequence_length": 16, "batch_size": 2, "seed": 5}
    return {"seed_everything": 1, "trainer": trainer, "model": module, "data": data}


def write_place() -> None:
    """The base of all runs, and documents of random length and content."""
    host("llama", layers=4).save_pretrained("base")
    writer, generator = ShardWriter(Path("corpus"), VOCAB), torch.Generator().manual_seed(0)
    Path("corpus").mkdir(exist_ok=True)
    for number in range(40):
        length = int(torch.randint(2, 24, (), generator=generator))
        writer.add(torch.randint(3, VOCAB, (length,), generator=generator).tolist(), length, f"document {number}")
    writer.finish("none")


def make_run(name: str, scratch: Path) -> None:
    """A run of four steps elsewhere, the same one stopped after two, and what its export computes."""
    path = scratch / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe(MODULES[name]), sort_keys=False))
    losses = fit(str(scratch / name), "--config", str(path), "--trainer.default_root_dir", str(scratch / name))
    fit(name, "--config", str(path), "--trainer.default_root_dir", name, "--trainer.max_steps", "2")
    assert main(["export", name, str(scratch / f"{name}-exported"), "--dtype", "float32"]) == 0
    with inside(Path("..")):
        record(f"run_{name}", kvtrain.load(scratch / f"{name}-exported"), losses=torch.tensor(losses[2:]).double())


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, and go back."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make(output: Path) -> None:
    """Make everything in a folder that holds none of it yet."""
    for part in (FOLDERS, PLACE, EXPECTED):
        (output / part).mkdir()
    with tempfile.TemporaryDirectory() as scratch, inside(output):
        for name, build in MODELS.items():
            build().save_pretrained(f"{FOLDERS}/{name}")
            record(name, kvtrain.load(f"{FOLDERS}/{name}"))
        with inside(Path(PLACE)):
            write_place()
            for name in MODULES:
                make_run(name, Path(scratch))
    (output / DIGESTS.name).write_text(as_json(digests(output)))


if __name__ == "__main__":
    assert kvtrain.__version__.startswith("0.1."), "these files are version 0.1's"
    torch.set_num_threads(1)
    make(Path(sys.argv[1]))
