"""The marks that transformers' tests wear."""

import pytest

THEIRS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
    "is_training_test",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for mark in THEIRS:
        config.addinivalue_line("markers", f"{mark}: of transformers")
