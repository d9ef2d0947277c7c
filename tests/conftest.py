"""What every test shares: a quiet machine, no network, and the same random numbers each time."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch or a Hugging Face library.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["OMP_NUM_THREADS"] = "1"  # the processes that share the tests fill the cores; theirs inherit it

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "CROSS_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NAME"),
)

settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.register_profile("random", deadline=None, print_blob=True)  # `make test-all`: --hypothesis-profile=random
settings.load_profile("same")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(autouse=True)
def _alike() -> None:
    """Whatever ran before in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_launcher_is_left() -> Iterator[None]:
    """What a test says of a launcher holds for that test: whoever asks later, accelerate too, would form a group."""
    before = {name: os.environ.get(name) for name in _LAUNCHER}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("this test leaves a torch.distributed process group behind")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for a GPU say why they do not run where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: garbage collections, of which there are many, need not look at it."""
    gc.collect()
    gc.freeze()
