"""Every family of hosts under every method: served as it trains, or refused with a sentence. Writes docs/families.md.

python -m tests.docs.families
"""

import functools
import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

import kvtrain
from kvtrain.help import DOCS
from kvtrain.models.hosts import windows
from tests.hosts import FAMILIES, SLIDING, dmc_at_rate, dms_at_rate, make_host, random_ids, with_random_mixers

PAGE = DOCS / "families.md"
# By what `tests.hosts` calls a host: what a reader does.
HOSTS = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mistral, all slide": "Mistral, every layer a window",
    "olmo2": "OLMo2",
    "qwen2": "Qwen2",
    "qwen2_sliding": "Qwen2, some layers windows",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma 3, its windows opened",
    "gemma3_sliding": "Gemma 3",
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "qwen3_moe": "Qwen3-MoE",
    "gpt_oss": "gpt-oss, its windows opened",
    "gpt_oss_sliding": "gpt-oss",
}
METHODS = ("Full", "DMC", "DMS", "Duo", "LCKV", "Hybrid", "policies")
LAYERS, LENGTH, WINDOW = 2, 40, 6
INTRODUCTION = """# Families and methods

Written by `python -m tests.docs.families`, which tries every cell: a model with random weights in float64, read whole
without a cache, and in pieces and token by token over the cache that serves; "yes" where the two agree to 1e-9.
Policies stand for all that need no training. A layer that slides stays as it is under every method, and holds its
window.
"""


def retrofit(column: str, host: PreTrainedModel) -> PreTrainedModel:
    """With settings so small that they do something to a text of forty tokens."""
    sliding = windows(host.config)
    first = next((layer for layer in range(LAYERS) if layer not in sliding), 0)
    shared = "_".join(f"{layer}s" if layer in sliding else str(first) for layer in range(LAYERS))
    full_heads = [[] if layer in sliding else [1] for layer in range(LAYERS)]
    methods = {
        "Full": kvtrain.Full(),
        "Duo": kvtrain.Duo(sink=2, recent=7, page_size=4, full_heads=full_heads),
        "LCKV": kvtrain.LCKV(kv_map=shared, sliding_window=WINDOW, page_size=4),
        "policies": kvtrain.H2O(budget=9, recent=3, page_size=4, prompt="blocks"),
    }
    if column == "DMC":
        return dmc_at_rate(host, 0.6, random_ids(2, LENGTH, seed=7), page_size=4, window=5)
    if column == "Hybrid":
        return with_random_mixers(kvtrain.convert_linear(host, page_size=4))
    return dms_at_rate(host, 0.7, window=6, page_size=4) if column == "DMS" else kvtrain.retrofit(host, methods[column])


@torch.no_grad()
def answer(family: str, column: str) -> str:
    """``yes``, or why not.

    Raises:
        AssertionError: The serving form is not the training form.
    """
    every = {"sliding_window": WINDOW} if "all slide" in family else {}
    host = make_host(family.partition(",")[0], layers=LAYERS, **every)
    try:
        model = retrofit(column, host)
    except ValueError as error:
        return re.sub(r"method '\w+'", "the method", str(error))
    ids, cache = random_ids(2, LENGTH, seed=3), model.make_cache()
    parts = ids.split([17, 1, 13, *[1] * 9], 1)
    served = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
    torch.testing.assert_close(served, model(ids, use_cache=False).logits, atol=1e-9, rtol=0)
    return "yes"


@functools.cache
def page() -> str:
    """The whole page."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    assert {family.partition(",")[0] for family in HOSTS} == {*FAMILIES, *SLIDING}
    yield INTRODUCTION
    yield f"| | {' | '.join(METHODS)} |"
    yield f"|---{'|---' * len(METHODS)}|"
    notes: list[str] = []
    for family, name in HOSTS.items():
        cells = []
        for column in METHODS:
            said = answer(family, column)
            if said != "yes" and said not in notes:
                notes.append(said)
            cells.append(said if said == "yes" else f"no ({notes.index(said) + 1})")
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    for number, note in enumerate(notes, 1):
        yield f"{number}. {note[0].upper()}{note[1:]}."
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
