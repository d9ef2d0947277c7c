"""A tokenizer, and folders of tokens written from known documents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtrain.data.shards import ShardWriter, TokenShards
from kvtrain.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer("kvtrain:tiny")


@pytest.fixture
def write_shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenShards]:
    """Writes documents of ids into a new folder and opens it."""

    def write(documents: list[list[int]], *, shard_tokens: int = 1 << 20, vocab_size: int = 1000) -> TokenShards:
        folder = tmp_path_factory.mktemp("shards")
        fill(folder, documents, shard_tokens, vocab_size)
        return TokenShards(folder)

    return write


def fill(folder: Path, documents: list[list[int]], shard_tokens: int, vocab_size: int = 1000) -> None:
    writer = ShardWriter(folder, vocab_size, shard_tokens)
    for number, document in enumerate(documents):
        writer.add(document, 3 * len(document), f"document {number}")
    writer.finish("")
