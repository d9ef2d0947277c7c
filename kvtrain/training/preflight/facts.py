"""What each rank finds out by itself, and what all of them measure together."""

import importlib.metadata
import os
import platform
import shutil
import socket
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore

from kvtrain.errors import first_line
from kvtrain.training.preflight.meeting import Meeting
from kvtrain.training.preflight.network import own_address
from kvtrain.training.preflight.world import World

_PACKAGES = ("kvtrain", "torch", "lightning", "transformers", "deepspeed")
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
_REPEATS = 5
_LOOKS, _PAUSE = 20, 0.25  # a network file system may show a new file seconds later


class Facts(NamedTuple):
    """Of one rank.

    Attributes:
        rank: Its number.
        node: Number of its node.
        host: The node's name.
        address: What its backend announces.
        interface: To which that belongs.
        route: The interface that leads to where all ranks meet.
        device: Its device in words; empty where it has none.
        memory: Bytes of the device, or of main memory that the ranks of a node share.
        run: The run folder as an absolute path.
        versions: Of packages, by name.
    """

    rank: int
    node: int
    host: str
    address: str
    interface: str
    route: str
    device: str
    memory: int
    run: str
    versions: dict[str, str]


def gather_facts(world: World, run: Path, backend: str) -> Facts:
    """What this rank knows."""
    place, device = own_address(backend), _device(world, backend)
    return Facts(world.rank, world.node, socket.gethostname(), *place, *device, str(run.absolute()), _versions())


def _device(world: World, backend: str) -> tuple[str, int]:
    if backend == "gloo":
        return f"cpu ({os.cpu_count()} cores)", main_memory()
    if world.local_rank >= torch.cuda.device_count():
        return "", 0
    properties = torch.cuda.get_device_properties(world.local_rank)
    return properties.name, properties.total_memory


def main_memory() -> int:
    """Bytes that processes may still take, within the limit of a container; 0 where nobody says."""
    limits = []
    if _MEMINFO.is_file():
        (line,) = (line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        limits.append(int(line.split()[1]) * 1024)
    if _CGROUP.is_file() and _CGROUP.read_text().strip().isdecimal():
        limits.append(int(_CGROUP.read_text()))
    return min(limits, default=0)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


class AllReduce(NamedTuple):
    """What a sum over all ranks takes.

    Attributes:
        latency: Seconds for four bytes.
        size: Bytes of the large one.
        seconds: What it took, the median of five.
        error: Why there are no figures; empty where there are.
    """

    latency: float = 0.0
    size: int = 0
    seconds: float = 0.0
    error: str = ""


def time_all_reduce(meeting: Meeting, backend: str) -> AllReduce:
    """Sum tensors over all ranks, one of 16 MiB on the CPU and of 256 MiB on GPUs; every rank calls it."""
    world, size = meeting.world, (256 if backend == "nccl" else 16) << 20
    assert meeting.store is not None
    try:
        if backend == "nccl":
            torch.cuda.set_device(world.local_rank)
        store, timeout = PrefixStore(backend, meeting.store), min(meeting.timeout, timedelta(seconds=60))
        distributed.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
        device = torch.device("cuda", world.local_rank) if backend == "nccl" else torch.device("cpu")
        latency, seconds = (_median_seconds(count, device) for count in (1, size // 4))
    except (RuntimeError, OSError) as error:
        return AllReduce(error=first_line(error)[:160])
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return AllReduce(latency, size, seconds)


def _median_seconds(count: int, device: torch.device) -> float:
    tensor, seconds = torch.zeros(count, device=device), []
    for _ in range(_REPEATS + 1):  # the first one opens connections
        distributed.barrier()
        begin = time.perf_counter()
        distributed.all_reduce(tensor)
        tensor[0].item()  # it has arrived
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


class Folder(NamedTuple):
    """What the ranks see of the run folder.

    Attributes:
        apart: Ranks that do not find what rank 0 wrote there, or may not write there.
        error: Why rank 0 could not write; empty where it could.
        free: Bytes of the file system that are free.
    """

    apart: list[int]
    error: str
    free: int


def try_folder(meeting: Meeting, run: Path) -> Folder:
    """Let rank 0 write into the run folder and all others find it and write there too; leaves nothing behind."""
    rank, name = meeting.world.rank, f".kvtrain-check-{os.getpid()}"
    created, error = _make(run, name) if rank == 0 else ([], "")
    name, error = meeting.share("folder", [name, error])[0]
    if error:
        return Folder([], error, 0)
    joins = _appears(run / name) and not _write(run / f"{name}-{rank}")
    free = shutil.disk_usage(run).free if rank == 0 else 0
    answers = meeting.share("joins", [joins, free])
    if rank == 0:
        _clear(run, name, created)
    return Folder([other for other, (ok, _) in enumerate(answers) if not ok], "", answers[0][1])


def _make(run: Path, name: str) -> tuple[list[Path], str]:
    """Write the first file; returns folders that were made for it, the innermost first, and what went wrong."""
    missing = [path for path in (run, *run.absolute().parents) if not path.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [], f"{error.filename}: {error.strerror}"
    return missing, _write(run / name)


def _write(path: Path) -> str:
    try:
        path.write_text("kvtrain check")
    except OSError as error:
        return f"{path.parent}: {error.strerror}"
    return ""


def _appears(path: Path) -> bool:
    for _ in range(_LOOKS):
        if path.is_file():
            return True
        if path.parent.is_dir():
            os.listdir(path.parent)  # has network file systems look again
        time.sleep(_PAUSE)
    return False


def _clear(run: Path, name: str, created: list[Path]) -> None:
    for path in run.glob(f"{name}*"):
        path.unlink()
    for folder in created:
        if not any(folder.iterdir()):
            folder.rmdir()


def as_facts(values: list[Any]) -> list[Facts]:
    """Facts that came as lists, through a meeting."""
    return [Facts(*value) for value in values]
