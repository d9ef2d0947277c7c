"""``kvtrain eval``: tasks by name, one row of figures each."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from kvtrain.evaluation.perplexity import perplexity
from kvtrain.inference.load import open_model

TASKS: dict[str, Callable[..., Any]] = {"perplexity": perplexity}


def run_tasks(
    model: str,
    tasks: list[str],
    *,
    corpus: str = "heldout",
    sequence_length: int = 1024,
    stride: int | None = None,
    limit: int | None = None,
    decode: bool = False,
    dtype: str | None = None,
) -> list[dict[str, Any]]:
    """Run tasks on a model.

    Args:
        model: Folder, Hub id, or ``kvtrain:tiny``.
        tasks: Names from ``TASKS``.
        corpus: Text to measure on.
        sequence_length: Tokens in a window.
        stride: Tokens from one window to the next; None leaves no overlap.
        limit: Windows to read; None reads all.
        decode: Feed token by token, as generation does, instead of in stretches.
        dtype: Of the weights; None takes what the folder holds.

    Raises:
        ValueError: Unknown task, model or corpus.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    loaded, tokenizer = open_model(model, dtype=dtype or "auto")
    settings = {"sequence_length": sequence_length, "stride": stride, "limit": limit, "chunk": 1 if decode else None}
    return [
        {"task": task, "model": model, **asdict(TASKS[task](loaded, tokenizer, corpus, **settings))} for task in tasks
    ]
