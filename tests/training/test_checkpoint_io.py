"""Writing and opening a checkpoint that is one file: memory, interruptions, a full disk, foreign content."""

import errno
import hashlib
import os
import pickle
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from kvtrain.training import checkpoint_io
from kvtrain.training.checkpoint_io import StreamedCheckpointIO

from .tiny_runs import TinyFull, make_rows, train

MIB = 1 << 20


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


class Watched:
    """How much anonymous memory is added while something is done."""

    def __enter__(self):
        self.before, self.most, self._done = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.is_set():
            self.most = max(self.most, anonymous_bytes() - self.before)
            time.sleep(0.002)

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


def content(tensors: int, each: int = 4 * MIB) -> dict:
    return {"state_dict": {str(number): torch.full((each // 4,), float(number)) for number in range(tensors)}}


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


@pytest.mark.parametrize("size", [64 * MIB, pytest.param(300 * MIB, marks=pytest.mark.roads)])
def test_saving_takes_no_second_copy_in_memory_or_elsewhere(tmp_path, monkeypatch, size):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    saved, io, path = content(4, size // 4), StreamedCheckpointIO(), tmp_path / "run" / "checkpoints" / ".a.new"
    with Watched() as memory:
        io.save_checkpoint(saved, path)
    assert path.stat().st_size > size
    assert memory.most < 0.05 * size
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "run", path.parent, path]
    assert io.written == {path: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert equal(saved, torch.load(path, weights_only=True))


def test_opening_takes_no_memory_until_tensors_are_copied(tmp_path):
    path, io = tmp_path / "a.ckpt", StreamedCheckpointIO()
    saved = content(8)
    io.save_checkpoint(saved, path)
    with Watched() as memory:
        found = io.load_checkpoint(path)
    assert memory.most < 2 * MIB
    assert equal(saved, found)


def at_piece(number: int, act):
    """Let something happen before one of the pieces that a checkpoint is written in."""
    seen = 0

    class File:
        def __init__(self, file):
            self.file, self.fileno = file, file.fileno

        def write(self, data):
            nonlocal seen
            seen += 1
            if seen >= number:
                act()
            return self.file.write(data)

    return File


def fail():
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


@pytest.mark.parametrize("piece", [1, 3, 20, 24, 50])
@pytest.mark.parametrize(("act", "expected"), [(fail, OSError), (interrupt, KeyboardInterrupt)])
def test_a_save_that_ends_early_says_why_and_leaves_nothing(tmp_path, monkeypatch, piece, act, expected):
    """In the archive's first bytes, in the first tensor, in the last one, and while the archive is closed."""
    monkeypatch.setattr(checkpoint_io, "_CHUNK", 1 << 18)
    stream = checkpoint_io._Stream
    planted = at_piece(piece, act)
    monkeypatch.setattr(checkpoint_io, "_Stream", lambda file: stream(planted(file)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    path = tmp_path / ".step-000003.ckpt.new"
    try:
        with pytest.raises(expected) as raised:
            StreamedCheckpointIO().save_checkpoint(content(3), path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []
    if act is fail:
        assert (raised.value.filename, raised.value.errno) == (str(path), errno.ENOSPC)


def test_short_writes_are_gone_on_with(tmp_path):
    class Short:
        def __init__(self):
            self.parts = []

        def write(self, data):
            self.parts.append(bytes(data[:3]))
            return min(3, len(data))

    stream = checkpoint_io._Stream(Short())
    assert stream.write(b"abcdefgh") == 8
    assert stream.file.parts == [b"abc", b"def", b"gh"]
    assert stream.digest.hexdigest() == hashlib.sha256(b"abcdefgh").hexdigest()


class Planted:
    def __reduce__(self):
        return os.abort, ()


def test_nothing_in_a_file_is_run(tmp_path):
    path, io = tmp_path / "a.ckpt", StreamedCheckpointIO()
    torch.save({"state_dict": {}, "planted": Planted()}, path)
    with pytest.raises(pickle.UnpicklingError, match="abort"):
        io.load_checkpoint(path)
    with pytest.raises(ValueError, match="weights_only=True"):
        io.load_checkpoint(path, weights_only=False)


@pytest.fixture
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"))


def test_a_run_that_goes_on_lets_go_of_the_file(rows, tmp_path):
    """Moments are taken over as they are found: mapped ones would hold a file that has been removed."""
    saving = {"enable_checkpointing": True, "checkpoint_every": 2}
    train(TinyFull(), rows, tmp_path / "run", 2, **saving)
    last = tmp_path / "run/checkpoints/last.ckpt"
    trainer = train(TinyFull(), rows, tmp_path / "run", 4, last, **saving)
    assert isinstance(trainer.strategy.checkpoint_io, StreamedCheckpointIO)
    assert "step-" not in Path("/proc/self/maps").read_text()


def test_a_recipe_may_bring_its_own_way(rows, tmp_path):
    class Other(StreamedCheckpointIO):
        """Another one."""

    saving = {"enable_checkpointing": True, "checkpoint_every": 2, "plugins": [Other()]}
    trainer = train(TinyFull(), rows, tmp_path / "run", 2, **saving)
    assert type(trainer.strategy.checkpoint_io) is Other
