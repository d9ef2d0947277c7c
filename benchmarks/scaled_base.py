"""Larger bases for comparisons: pretrained on Python's own library and more text, then taught to find what names mean.

What ``kvtrain:recall`` is to ``kvtrain:tiny``, in the same two recipes at another width and depth. Made once, in runs
that go on; minutes on a GPU, days on a CPU.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training import ROOT, config, export, read_recipe, train

# By millions of parameters; heads divide by 8, so that an eighth of them can be shared.
SHAPES: dict[int, dict[str, int]] = {
    6: {},  # kvtrain:tiny's own
    50: {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 16, "head_dim": 64},
    150: {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 21,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 48,
    },
}
STEPS, BATCH = 2000, 32  # of each of the two trainings, in rows of 1,024 tokens


def scaled_base(millions: int, runs: Path, text: Sequence[str], steps: int = STEPS, batch_size: int = BATCH) -> Path:
    """Folder of a base, trained first where it is not there yet.

    Args:
        millions: One of ``SHAPES``.
        runs: Where its trainings go.
        text: Files or folders to learn from beside Python's own library.
        steps: Of each training.
        batch_size: Rows of a step.
    """
    folder = runs / f"base-{millions}m"
    folder.mkdir(parents=True, exist_ok=True)
    shape = {**json.loads((ROOT / "configs" / "models" / "tiny_llama.json").read_text()), **SHAPES[millions]}
    model_config = folder / "config.json"
    model_config.write_text(json.dumps(shape, indent=1) + "\n")
    own = {"corpus": ["stdlib", *text], "batch_size": batch_size}
    schedule = {"steps": steps, "seed": 1}
    run = folder / "pretrain"
    changes = {"model_config": str(model_config)}
    pretrained = config("pretrain", run, **schedule, data=_data("pretrain", own), changes=changes)
    base = export(train(run, pretrained))
    run = folder / "recall"
    content = config("recall", run, base=str(base), **schedule, data=_data("recall", own), changes={})
    return export(train(run, content))


def _data(recipe: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data with other settings, whichever form it has."""
    content: dict[str, Any] = read_recipe(recipe)["data"]
    if "init_args" not in content:
        return {**content, **own}
    return {**content, "init_args": {**content["init_args"], **own}}
