"""Folders as users export them, by name, and what ``generate`` answers from them."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kvtrain
from kvtrain.assets import resolve
from kvtrain.models.gqa import convert_gqa
from kvtrain.models.method import Method

TINY = resolve("kvtrain:tiny")  # 6 layers, 8 key-value heads of 32 channels
EXPERTS = ("qwen3_moe", "mixtral", "olmoe")
FAMILIES = ("mistral", "qwen2", "qwen3", "olmo2", *EXPERTS)
NEW_TOKENS = 48
LEAST_GAP = 1e-4  # between the best two logits, below which a tie is no mistake
LENGTHS = (3, 7, 20, 33, 64, 90, 130, 200)


def _tiny() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def _lckv(**settings) -> Callable[[], PreTrainedModel]:
    return lambda: kvtrain.retrofit(_tiny(), kvtrain.LCKV(**settings))


def _duo(sink: int, recent: int) -> PreTrainedModel:
    return kvtrain.retrofit(_tiny(), kvtrain.Duo(sink=sink, recent=recent, full_heads=[[0, 2, 4, 6]] * 6))


def _sliding() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "mistral", num_hidden_layers=2, hidden_size=64, intermediate_size=64, sliding_window=24
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _transnormer(variant: str, **settings) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(1)
        sizes = {"vocab_size": AutoConfig.from_pretrained(TINY).vocab_size, "hidden_size": 256}
        config = kvtrain.TransNormerConfig(variant=variant, tie_word_embeddings=False, **sizes, **settings)
        return kvtrain.TransNormerForCausalLM(config)

    return build


def _family(model_type: str, method: Method) -> Callable[[], PreTrainedModel]:
    """A small host of another family, with weights so large that its answers differ from each other."""

    def build() -> PreTrainedModel:
        torch.manual_seed(3)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 512}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        tokens = {"vocab_size": AutoConfig.from_pretrained(TINY).vocab_size, "tie_word_embeddings": False}
        tokens |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        experts = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        others = {"initializer_range": 0.3, "sliding_window": None, **(experts if model_type in EXPERTS else {})}
        config = AutoConfig.for_model(model_type, **sizes, **heads, **tokens, **others)
        return kvtrain.retrofit(AutoModelForCausalLM.from_config(config, dtype=torch.float32), method)

    return build


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "full": lambda: kvtrain.retrofit(_tiny(), kvtrain.Full()),
    "gqa2": lambda: convert_gqa(_tiny(), 2),
    "cla2": _lckv(kv_map="cla2"),
    "thirds": _lckv(kv_map="0_0_0_3_3_3"),
    "gqa4-cla3": lambda: kvtrain.retrofit(convert_gqa(_tiny(), 4), kvtrain.LCKV(kv_map="cla3")),
    "yoco": _lckv(kv_map="yoco", sliding_window=24),
    "duo": lambda: _duo(8, 24),
    "duo-long": lambda: _duo(128, 256),
    "streaming": lambda: kvtrain.retrofit(_tiny(), kvtrain.StreamingLLM(budget=32, sink=4, prompt="blocks")),
    "t1": _transnormer("T1", decay="released"),
    "t2": _transnormer("T2", decay="released"),
    "t2-none": _transnormer("T2", decay="none"),
    "t1-paper": _transnormer("T1", decay="paper", position_embedding="learned"),
    **{f"{family}-cla2": _family(family, kvtrain.LCKV(kv_map="cla2")) for family in FAMILIES},
    **{f"{family}-duo": _family(family, kvtrain.Duo(sink=8, recent=24, full_heads=[[1]] * 4)) for family in FAMILIES},
    # What is refused:
    "sliding": lambda: kvtrain.retrofit(_sliding(), kvtrain.Full()),
    "dmc": lambda: kvtrain.retrofit(_tiny(), kvtrain.DMC()),
    "from-above": _lckv(kv_map="lckv-w2"),
    "diagonals": _lckv(kv_map="plain", mask_all_diagonals=True),
    "values": _lckv(kv_map="cla2", value_map="first"),
    "residual": _lckv(kv_map="pizza-bottom", residual=True),
    "unequal": lambda: kvtrain.retrofit(_tiny(), kvtrain.Duo(full_heads=[[0] * 0, [0], [1, 2], [3], [4], [5]])),
    "gates": lambda: kvtrain.retrofit(_tiny(), kvtrain.Duo()),
    "compensation": lambda: kvtrain.retrofit(_tiny(), kvtrain.Duo(full_heads=[[0]] * 6, compensation=True)),
    "bits": lambda: kvtrain.retrofit(_tiny(), kvtrain.Full(kv_bits=8)),
    "h2o": lambda: kvtrain.retrofit(_tiny(), kvtrain.H2O(budget=32, recent=8)),
    "masked": lambda: kvtrain.TransNormerForMaskedLM(
        kvtrain.TransNormerConfig(vocab_size=512, hidden_size=64, num_attention_heads=2, causal=False)
    ),
}

_ROOT = tempfile.TemporaryDirectory(prefix="kvtrain-vllm-")


@functools.cache
def folder(name: str) -> str:
    """The folder of a model, with the packaged tokenizer; written at first use."""
    path = Path(_ROOT.name) / name
    MODELS[name]().save_pretrained(path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(path)
    for code in path.glob("*.py"):  # which `kvtrain export` writes where it is asked to
        code.unlink()
    config = json.loads((path / "config.json").read_text())
    config.pop("auto_map", None)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@functools.cache
def prompts() -> list[list[int]]:
    """Real text, cut into prompts of ``LENGTHS``."""
    text = " ".join(_heldout())
    tokens = AutoTokenizer.from_pretrained(TINY)(text)["input_ids"]
    starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    return [tokens[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


def _heldout() -> list[str]:
    """The opening of the packaged held-out text."""
    path = Path(kvtrain.__file__).parent / "assets" / "heldout.jsonl"
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"][:2000] for _, line in zip(range(4), lines, strict=False)]


@functools.cache
def expected(name: str) -> list[list[int] | None]:
    """What ``generate`` answers to each prompt, greedily; None where two tokens are too close to call."""
    model = kvtrain.load(folder(name), dtype=torch.float32).eval()
    found: list[list[int] | None] = []
    for prompt in prompts():
        options = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, **options)
        best = torch.cat(answer.logits).topk(2).values
        sure = bool((best[:, 0] - best[:, 1] >= LEAST_GAP).all())
        found.append(answer.sequences[0, len(prompt) :].tolist() if sure else None)
    return found
