"""Several processes on this machine, and what the first of them leaves."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .runs import ROOT


def launch(module: str, world_size: int, folder: Path, *arguments: object, **environment: str) -> dict[str, Any]:
    """Run ``python -m MODULE WORLD_SIZE FOLDER ...`` as so many ranks; rank 0 leaves ``results.pt`` in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", module, *map(str, (world_size, folder, *arguments))]
    ranks = [_start(command, folder / f"log{rank}", {**shared, "LOCAL_RANK": str(rank)}) for rank in range(world_size)]
    try:
        codes = [process.wait(timeout=1000) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * world_size, (folder / "log0").read_text()[-3000:]
    return torch.load(folder / "results.pt", weights_only=False)


def _start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
        )
