"""A run on disk: what ``last`` means, what is kept, what differs."""

import os
from pathlib import Path

import pytest

from kvtrain import run_folder

from .training.small_runs import steps_saved


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": {"init_args": {"b": 1}}}, {"a": {"init_args": {"b": 2}}}, "a.b"),
        ({"a": [1, {"c": 2}]}, {"a": [1, {"c": 3}]}, "a.1.c"),
        ({"a": [1]}, {"a": [1, 2]}, "a"),
        ({"a": 1}, {"a": 1, "b": None}, None),
        ({"a": 1}, {"b": 1}, "a"),
    ],
)
def test_the_first_difference_is_named(old, new, found):
    assert run_folder.first_difference(old, new) == found


def touch(run: Path, step: int, seconds: int) -> Path:
    path = run / "checkpoints" / f"step-{step:06d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(str(step).encode())
    os.utime(path, (seconds, seconds))
    return path


def test_the_newest_files_are_kept_whatever_their_step(tmp_path):
    touch(tmp_path, 900, 1)
    touch(tmp_path, 1000, 2)
    touch(tmp_path, 100, 3)
    run_folder.point_last(touch(tmp_path, 200, 4))
    run_folder.prune(tmp_path, keep=2)
    assert steps_saved(tmp_path) == [100, 200]
    run_folder.point_last(tmp_path / "checkpoints" / "step-000100.ckpt")
    run_folder.prune(tmp_path, keep=1)
    assert steps_saved(tmp_path) == [100, 200]


def test_last_falls_back_to_the_newest_file(tmp_path):
    assert run_folder.last_checkpoint(tmp_path) is None
    touch(tmp_path, 3, 1)
    newest = touch(tmp_path, 6, 2)
    assert run_folder.last_checkpoint(tmp_path) == newest
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to("step-000009.ckpt")
    assert run_folder.last_checkpoint(tmp_path) == newest


def test_last_is_a_copy_where_links_cannot_be_made(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not here")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    run_folder.point_last(touch(tmp_path, 3, 1))
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert (last.is_symlink(), last.read_bytes()) == (False, b"3")


def test_publishing_replaces_files_and_folders(tmp_path):
    new, old = tmp_path / ".new", tmp_path / "old"
    for folder, words in ((old, "before"), (new, "after")):
        folder.mkdir()
        (folder / "shard").write_text(words)
    run_folder.publish(new, old)
    assert (old / "shard").read_text() == "after"
    assert not new.exists()
