"""How ``kvpress_goldens.safetensors`` was made: what kvpress computes on the packaged model, by several of its presses.

kvpress asks for an older transformers than kvtrain does and patches attention for the whole process, so that this runs
in an environment of its own, and imports nothing of kvtrain::

    pip install torch==2.13.0 transformers==5.23.0 "cachetools<6" "fire<0.7" requests peft six termcolor pandas
    pip install --no-deps kvpress==0.5.5
    python tests/models/make_kvpress_goldens.py

Its hooks read a keyword that transformers no longer passes, ``cache_position``; given by hand, it arrives.

The file holds the tokens, the columns of the vocabulary whose logits it holds, and for every press and share that it
drops the logits ``(20, columns)`` and the likeliest token ``(20,)`` of each of the tokens behind the prompt.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "kvtrain" / "assets"
PROMPT, ANSWER, COLUMNS = 700, 20, 96
DROPPED = (0.5, 0.75)


def presses(dropped: float) -> dict[str, Any]:
    """kvpress' own settings but one: the paper adds 0.02 to expected probabilities, and kvpress by default nothing."""
    import kvpress

    return {
        "streaming_llm": kvpress.StreamingLLMPress(dropped),
        "snapkv": kvpress.SnapKVPress(dropped),
        "snapkv_adaptive": kvpress.AdaKVPress(kvpress.SnapKVPress(dropped)),
        "expected_attention": kvpress.ExpectedAttentionPress(dropped, epsilon=0.02),
        "expected_attention_mean": kvpress.ExpectedAttentionPress(dropped, use_covariance=False, use_vnorm=False),
    }


def packaged() -> tuple[PreTrainedModel, Tensor]:
    """The packaged model in float32, and tokens ``(1, T)`` of its held-out text."""
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    lines = (ASSETS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines)
    return model, tokenizer(text, return_tensors="pt").input_ids[:, : PROMPT + ANSWER]


@torch.no_grad()
def compressed_logits(model: PreTrainedModel, ids: Tensor, press: Any) -> Tensor:
    """Logits ``(ANSWER, V)`` of the tokens behind the prompt, each sent by itself to what the press has left."""
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=ids[:, :PROMPT], past_key_values=cache, cache_position=torch.arange(PROMPT))
    logits = []
    for position in range(PROMPT, PROMPT + ANSWER):
        at = torch.tensor([position])
        output = model(ids[:, position : position + 1], past_key_values=cache, position_ids=at[None], cache_position=at)
        logits.append(output.logits[0, 0])
    return torch.stack(logits)


def main() -> None:
    """Write the file beside this one."""
    model, ids = packaged()
    columns = torch.linspace(0, model.config.vocab_size - 1, COLUMNS).long()
    goldens = {"ids": ids[0].int(), "columns": columns.int()}
    for dropped in DROPPED:
        for name, press in presses(dropped).items():
            logits = compressed_logits(model, ids, press)
            goldens[f"{name}/{dropped}/logits"] = logits[:, columns].contiguous()
            goldens[f"{name}/{dropped}/likeliest"] = logits.argmax(-1).int()
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    save_file(goldens, HERE / "kvpress_goldens.safetensors", metadata=versions)


if __name__ == "__main__":
    main()
