"""The Hub, asked once and briefly: without a network its libraries retry for a minute before they give up."""

import functools
from collections.abc import Iterator
from typing import Any

from kvtrain.errors import first_line

HUB_PREFIX = "hf:"
_PATIENCE_SECONDS = 3.0


@functools.cache
def why_unreachable() -> str | None:
    """Why the Hub cannot be asked (no network, ``HF_HUB_OFFLINE``), or None if it can; one short attempt a process."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_SECONDS)
    except Exception as error:  # each HTTP library has its own family of errors
        return first_line(error)
    return None


def hub_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    """Stream the rows of a Hub dataset.

    Args:
        name: ``org/name`` or ``org/name:config``; with ``@validation`` at its end that split.
        split: Such as ``"train"``, where the name says nothing.

    Raises:
        ValueError: The Hub cannot be reached, the dataset cannot be opened, or the stream breaks off.
    """
    reason = why_unreachable()
    if reason is not None:
        raise ValueError(
            f"{HUB_PREFIX}{name}: the Hub cannot be reached ({reason}); "
            "download the dataset elsewhere as jsonl or parquet and give its path"
        )
    import datasets

    dataset, _, asked = name.partition("@")
    repository, _, config = dataset.partition(":")
    split = asked or split
    number = 0
    try:
        rows = datasets.load_dataset(repository, config or None, split=split, streaming=True)
        for row in rows:
            number += 1
            yield row
    except Exception as error:  # the library raises a dozen unrelated types for "cannot be had"
        place = f"after row {number}" if number else f"cannot open split {split!r}"
        raise ValueError(f"{HUB_PREFIX}{name}: {place} ({first_line(error)})") from error
