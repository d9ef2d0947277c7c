"""A disk without room: one line that names the run folder, nothing half-written, the same end once there is room."""

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from kvtrain import run_folder
from kvtrain.durable import files_in
from kvtrain.training.strategies import DEEPSPEED_INSTALLED

from .ranks import TIMEOUT, TwoRanks
from .runs import assert_same_run, log_of

ZERO2 = pytest.mark.skipif(not DEEPSPEED_INSTALLED, reason="needs DeepSpeed: pip install kvtrain[deepspeed]")


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own; a function gives it another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            pytest.skip(f"file systems cannot be mounted here: {answer.stderr.strip()}")

    mount("-o", "size=64m")
    yield folder, lambda size: mount("-o", f"remount,size={size}")
    subprocess.run(["umount", str(folder)], check=False)


def checkpoint_size(run: Path) -> int:
    return sum(file.stat().st_size for file in files_in(run_folder.last_checkpoint(run)))


def fill(path: Path) -> None:
    """Leave no byte on a file's disk."""
    with path.open("ab", buffering=0) as file:
        for size in (4096, 1):
            with suppress(OSError):
                while True:
                    file.write(b"x" * size)


def refused(place, run: Path) -> str:
    """What a run says that finds no room."""
    log_of(run).unlink(missing_ok=True)
    assert place.start(run).wait() == 2
    assert list(run.rglob(".*")) == []
    lines = errors_of(run)
    assert len(lines) == 1 and "Traceback" not in log_of(run).read_text()
    return lines[0]


def errors_of(run: Path) -> list[str]:
    """What all processes of a run have to say."""
    said = [line.partition("kvtrain: error: ") for line in log_of(run).read_text().splitlines()]
    return [words for before, sign, words in said if sign and not before]


@pytest.mark.roads
def test_a_full_disk_stops_a_run_that_goes_on_later(place, whole, disk):
    """Room for two checkpoints and a half, then for what a killed process has left, then for nothing, then for all."""
    (folder, resize), size = disk, checkpoint_size(whole)
    run, others, full = folder / "run", folder / "others", "No space left on device; make room there"
    resize(size * 5 // 2)
    assert refused(place, run) == f"{run}/checkpoints/.step-000009.ckpt.new: {full}"
    saved = run_folder.step_files(run)
    assert [run_folder.step_of(path) for path in saved] == [3, 6]
    assert [run_folder.resolve_checkpoint(run, str(path)) for path in saved] == saved

    (run / "checkpoints" / ".step-000099.ckpt.new").write_bytes(b"x" * (size // 4))
    fill(others)
    assert refused(place, run) == f"{run}/checkpoints/.step-000009.ckpt.new: {full}"
    fill(others)
    assert refused(place, run) == f"{run}/run.lock: {full}"

    others.unlink()
    resize("64m")
    place.finish(run)
    assert_same_run(run, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", pytest.param("zero2", marks=ZERO2)])
def test_a_full_disk_stops_all_ranks_with_the_same_words(place, tmp_path, disk, strategy):
    """Whichever of them finds no room: none is left waiting, and what the others had written goes, too."""
    (folder, resize), two, whole = disk, TwoRanks(place, strategy), tmp_path / "whole" / "run"
    whole.parent.mkdir()
    two.finish(whole)
    run = folder / "run"
    resize(checkpoint_size(whole) * 5 // 2)
    assert two.start(run, *TIMEOUT).codes() == [2, 2]
    ends = [line for line in errors_of(run) if " of 2 ends at step 9: OSError: [Errno 28] No space left" in line]
    words = sorted(set(errors_of(run)) - set(ends))
    assert len(ends) == 2 and "Traceback" not in log_of(run).read_text()
    assert all(word.startswith(f"{run}/checkpoints/.step-000009.ckpt.new") for word in words), words
    assert all(word.endswith(": No space left on device; make room there") for word in words), words
    assert list(run.rglob(".*.new")) == []
    resize("64m")
    two.finish(run)
    assert_same_run(run, whole)
