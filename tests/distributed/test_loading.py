"""A base that two ranks read into their parts is the base that one reads whole, and takes half its memory."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtrain.training.strategies import DEEPSPEED_INSTALLED

from .launch import launch
from .loading_worker import BASES, MODULES, logits

SIZES = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for base in BASES:
        torch.manual_seed(0)
        config = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=base == "tied", **SIZES)
        host = LlamaForCausalLM(config).to(torch.bfloat16 if base == "half" else torch.float32)
        host.save_pretrained(folder / base, max_shard_size="20MB")
    return folder


@pytest.fixture(scope="module", params=["fsdp2", *(["zero3", "zero3_offload"] if DEEPSPEED_INSTALLED else [])])
def loaded(place, request):
    return launch("tests.distributed.loading_worker", 2, place, request.param, DS_ACCELERATOR="cpu")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["teacher", *MODULES])
def test_logits_and_memory(place, loaded, name, base):
    found, make = loaded[f"{name} {base}"], MODULES["full" if name == "teacher" else name]
    assert torch.equal(found["logits"], logits(make(str(place / base)).build_model()))
    made_anew = 0.1 if name in ("duo, rounded", "lckv, averaged", "converted") else 0.0  # attention, a part of it
    assert found["peak"] < (0.6 + made_anew) * found["size"] + (4 << 20)
