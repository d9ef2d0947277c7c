"""The marks that transformers' tests wear."""

from pathlib import Path

import pytest

OURS = ("test_known", "test_source")
MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
    "is_training_test",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Their tests are fetched and imported only where roads are run; ours of them run everywhere."""
    theirs = collection_path.suffix == ".py" and collection_path.stem not in OURS
    return True if theirs and "not roads" in config.option.markexpr else None
