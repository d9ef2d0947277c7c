"""Runs in forked processes that are killed, interrupted or starved of room, and what must be equal in the end."""

import csv
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from kvtrain import run_folder
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.models.sharded import ShardedReader, is_sharded
from kvtrain.models.zero import read_shard
from tests.hosts import make_host
from tests.processes import KVTRAIN, PATIENCE, Forked
from tests.training.measured import MEASURED
from tests.training.small_runs import recipe_text, write_place

STEPS = 24

# Python may be started with Ctrl-C ignored, and Lightning was imported without a rank; a disk is slow, so that a save
# has moments to be hit in.
OPENING = """
import os, signal, sys, time
sys.path.insert(0, {place!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
from lightning.fabric.utilities.rank_zero import rank_zero_only
rank_zero_only.rank = int(os.environ.get("LOCAL_RANK", 0))
def slow(opened, fsync=os.fsync):
    time.sleep({seconds})
    fsync(opened)
os.fsync = slow
"""


class Process(Protocol):
    """One process, or all ranks of a run together."""

    def poll(self) -> int | None:
        """The exit code, once there is one."""

    def wait(self) -> int:
        """The exit code; minus the signal's number of one that was killed."""


class Starts(Protocol):
    """What trains in a run folder."""

    def start(self, run: Path) -> Process:
        """Train, going on from what there is."""

    def finish(self, run: Path) -> None:
        """Train to the end."""


@dataclass(frozen=True)
class Place:
    """A corpus, a base and a recipe that retrofits it, saves at every third step and validates at every fourth.

    Attributes:
        folder: Where they lie.
        sync: Seconds that a disk takes at least for each file.
    """

    folder: Path
    sync: float = 0.02

    @classmethod
    def build(cls, folder: Path) -> "Place":
        """Write it; the layer has two key-value heads."""
        write_place(folder)
        host = make_host(dtype=torch.float32, layers=1, vocab_size=4096, tie_word_embeddings=True)
        host.save_pretrained(folder / "base")
        load_tokenizer("kvtrain:tiny").save_pretrained(folder / "base")
        recipe = yaml.safe_load(recipe_text(folder, folder / "unused", STEPS))
        arguments = {key: value for key, value in recipe["model"]["init_args"].items() if key != "model_config"}
        lengths = {"zero_out": 5, "retrofit": 11, "finetune": STEPS - 16}
        arguments["phases"] = [{"name": name, "steps": steps, "learning_rate": 1e-3} for name, steps in lengths.items()]
        arguments |= {"base": str(folder / "base"), "method": {"compression": 2.0, "window": 4, "init_bias": 0.0}}
        recipe["model"] = {"class_path": "DMCModule", "init_args": arguments}
        recipe["trainer"]["num_threads"] = 1
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return cls(folder)

    def start(self, run: Path, *options: str, **environment: str) -> Forked:
        """Train, going on from what there is."""
        arguments = ["fit", "--config", str(self.folder / "recipe.yaml"), "--trainer.default_root_dir", str(run)]
        going_on = [] if "--ckpt_path" in options else ["--ckpt_path", "last"]
        program = OPENING.format(place=str(self.folder), seconds=self.sync) + KVTRAIN
        return Forked(program, [*arguments, *going_on, *options], log_of(run), **environment)

    def finish(self, run: Path, *options: str) -> None:
        """Train to the end."""
        assert self.start(run, *options).wait() == 0, tail(run)


def log_of(run: Path) -> Path:
    """Not beside the run, whose disk may be full."""
    return run.parent.parent / f"{run.parent.name}-{run.name}.log"


def tail(run: Path) -> str:
    return log_of(run).read_text()[-3000:]


def unfinished(run: Path) -> set[str]:
    """What is being written now."""
    return {path.name for path in run.glob("checkpoints/.*.new")}


def wait_for(there: Callable[[], bool], process: Process) -> bool:
    """Wait until something is there or the process has ended; whether it is there."""
    until = time.monotonic() + PATIENCE
    while not there():
        if process.poll() is not None:
            return False
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.0005)
    return True


def reach(process: Process, run: Path, saves: int, delay: float) -> bool:
    """Wait for the process' first step, or for some save after it, and a little longer; whether it is still there."""
    config = run / "config.yaml"
    before = config.stat().st_mtime_ns if config.exists() else None
    if not wait_for(lambda: config.exists() and config.stat().st_mtime_ns != before, process):
        return False
    for there in [True, *([False, True] * (saves - 1))] if saves else []:
        if not wait_for(lambda there=there: bool(unfinished(run)) == there, process):
            return False
    time.sleep(delay)
    return process.poll() is None


def kill(process: Forked, run: Path) -> bool:
    """Kill a process without mercy; whether it was still there."""
    os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def kill_often(
    place: Starts, folder: Path, kills: int, seed: int, kill: Callable[[Any, Path], bool] = kill
) -> tuple[list[Path], int]:
    """Kill runs without mercy, half of them while they save, and finish them.

    Args:
        place: What they train on, and how.
        folder: Where they go; a run that ends before it has been killed often enough is followed by another.
        kills: How many in all.
        seed: Of the moments.
        kill: Kills what was started in a run folder, and tells whether it was still there.

    Returns:
        The runs, and how many kills left something unfinished.
    """
    moments, runs, left, done = random.Random(seed), [folder / "killed-1"], 0, 0
    while done < kills:
        process, saving = place.start(runs[-1]), done % 2 == 0
        delay = moments.random() * (0.5 if not saving else 0.12 if done % 4 else 0.01)  # the file itself, all of a save
        if not reach(process, runs[-1], moments.randrange(1, 4) if saving else 0, delay):
            assert process.wait() == 0, tail(runs[-1])
            runs.append(folder / f"killed-{len(runs) + 1}")
            continue
        if kill(process, runs[-1]):
            left, done = left + bool(unfinished(runs[-1])), done + 1
    place.finish(runs[-1])
    return runs, left


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a table, without what time has a part in."""
    with path.open(newline="") as file:
        return [{name: text for name, text in row.items() if name not in MEASURED} for row in csv.DictReader(file)]


def assert_same_run(run: Path, whole: Path) -> None:
    """The same bits in weights and moments, the same figures and ratings, the same files."""
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (learnt(folder / "checkpoints" / name) for folder in (run, whole))
        assert_equal(ours, theirs, name)
    for name in ("metrics.csv", "head_compression.csv"):
        assert table(run / name) == table(whole / name)
    manifests = [run_folder.read_manifest(folder / "checkpoints") for folder in (run, whole)]
    ratings = [{name: entry["val_perplexity"] for name, entry in manifest.items()} for manifest in manifests]
    assert ratings[0] == ratings[1]
    assert files_of(run) == files_of(whole)


_FILE = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
_SHARD = ("module", "optimizer_state_dict", "lr_schedulers", "global_step")


def learnt(checkpoint: Path) -> dict[str, Any]:
    """Weights and moments, and where a schedule stands, of one device, of FSDP2 or of ZeRO."""
    if checkpoint.is_file():
        content = torch.load(checkpoint, weights_only=True)
        return {part: content[part] for part in _FILE}
    if is_sharded(checkpoint):
        reader = ShardedReader(checkpoint)
        rest = {part: reader.rest()[part] for part in ("param_groups", "lr_schedulers", "global_step")}
        return {name: reader.read(name) for name in reader.tensors()} | rest
    shards = {path.name: read_shard(path) for path in checkpoint.rglob("*.pt")}
    assert shards
    return {name: {part: shard[part] for part in _SHARD if part in shard} for name, shard in shards.items()}


def files_of(run: Path) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*"))


def assert_equal(ours: object, theirs: object, name: str) -> None:
    """The same bits at every leaf."""
    if isinstance(ours, torch.Tensor):
        assert isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs), name
    elif isinstance(ours, dict):
        assert isinstance(theirs, dict) and ours.keys() == theirs.keys(), name
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{name}.{key}")
    elif isinstance(ours, list | tuple):
        assert isinstance(theirs, list | tuple) and len(ours) == len(theirs), name
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{name}.{number}")
    else:
        assert ours == theirs or vars(ours) == vars(theirs), name
