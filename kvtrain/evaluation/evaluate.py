"""``kvtrain eval``: tasks by name, one row of figures each."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from kvtrain.evaluation.perplexity import perplexity
from kvtrain.inference.load import open_model


def _perplexity(model: Any, tokenizer: Any, corpus: str, sequence_length: int, limit: int | None) -> dict[str, Any]:
    return asdict(perplexity(model, tokenizer, corpus, sequence_length=sequence_length, limit=limit))


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"perplexity": _perplexity}


def run_tasks(
    model: str,
    tasks: list[str],
    *,
    corpus: str = "heldout",
    sequence_length: int = 1024,
    limit: int | None = None,
    dtype: str | None = None,
) -> list[dict[str, Any]]:
    """Run tasks on a model.

    Args:
        model: Folder, Hub id, or ``kvtrain:tiny``.
        tasks: Names from ``TASKS``.
        corpus: Text to measure on.
        sequence_length: Tokens in a window.
        limit: Windows to read; None reads all.
        dtype: Of the weights; None takes what the folder holds.

    Raises:
        ValueError: Unknown task, model or corpus.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    loaded, tokenizer = open_model(model, dtype=dtype or "auto")
    return [
        {"task": task, "model": model, **TASKS[task](loaded, tokenizer, corpus, sequence_length, limit)}
        for task in tasks
    ]
