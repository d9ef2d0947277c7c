"""What folders and runs of version 0.1 must still give: measured so when they were made, and measured so now."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvtrain.cli import main
from kvtrain.metrics import read_metrics

HERE = Path(__file__).parent
FOLDERS, PLACE, EXPECTED = "folders", "place", "expected"
DIGESTS = HERE / "digests.json"
NEW_TOKENS = 8


@torch.no_grad()
def measure(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of the parallel form; of a language model also the greedy continuation and the bytes of its cache.

    Gates that are fractions have no cache, and no bytes.

    Args:
        model: Opened from a folder.
        inputs: ``input_ids`` and ``attention_mask``, ``(B, T)``, padded on the left.
    """
    model.eval()
    if not model.can_generate():
        return {"logits": model(**inputs).logits}
    found = {"logits": model(**inputs, use_cache=False).logits}
    serves = not any(name.endswith(".gates") for name, _ in model.named_parameters())
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    out = model.generate(**inputs, **length, do_sample=False, use_cache=serves, return_dict_in_generate=True)
    found["sequences"] = out.sequences
    if serves:
        found["kv_bytes"] = torch.tensor([out.past_key_values.kv_bytes()])
    return found


def fit(run: str, *options: str) -> list[float]:
    """Train, and return the losses of all steps in a run folder."""
    assert main(["fit", *options]) == 0
    rows = read_metrics(Path(run))
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of all files of version 0.1, by their paths."""
    files = [path for part in (FOLDERS, PLACE, EXPECTED) for path in (root / part).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def as_json(value: object) -> str:
    """As it is written into files here."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"
