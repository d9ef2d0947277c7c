"""A run on disk: what ``last`` means, what is kept, what differs."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from kvtrain import durable, run_folder
from kvtrain.errors import UsageError

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
    durable.publish(new, old)
    assert (old / "shard").read_text() == "after"
    assert not new.exists()


def write_whole(path: Path, words: str) -> Path:
    """A file that passes for a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", words)
    return path


def add(run: Path, step: int, words: str = "content") -> Path:
    final = run_folder.step_path(run, step)
    run_folder.add_checkpoint(write_whole(final.with_name(f".{final.name}.new"), words), final)
    return final


def manifest(run: Path) -> dict:
    return json.loads((run / "checkpoints" / "manifest.json").read_text())


def test_the_best_is_the_one_of_lowest_perplexity(tmp_path):
    for step, perplexity in ((10, 5.0), (20, 3.0), (30, 4.0), (40, float("nan"))):
        run_folder.rate_checkpoint(add(tmp_path, step), perplexity)
        run_folder.prune(tmp_path, keep=1)
    assert steps_saved(tmp_path) == [20, 40]
    assert run_folder.best_checkpoint(tmp_path) == run_folder.step_path(tmp_path, 20)
    assert {name: entry["val_perplexity"] for name, entry in manifest(tmp_path).items()} == {
        "step-000020.ckpt": 3.0,
        "step-000040.ckpt": None,
    }
    run_folder.rate_checkpoint(add(tmp_path, 50), 2.5)
    run_folder.prune(tmp_path, keep=1)
    assert steps_saved(tmp_path) == [50]


def test_best_without_a_best_says_what_to_do(tmp_path):
    add(tmp_path, 3)
    with pytest.raises(UsageError, match=r"has no best checkpoint.*trainer\.checkpoint_every"):
        run_folder.resolve_checkpoint(tmp_path, "best")
    assert run_folder.resolve_checkpoint(tmp_path / "none", "last") is None


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"step-000003.ckpt": 1}', '{"step-000003.ckpt": {"step": 3}}'])
def test_a_run_goes_on_without_a_manifest_that_can_be_read(tmp_path, text):
    path = add(tmp_path, 3)
    file = tmp_path / "checkpoints" / "manifest.json"
    file.write_text(text) if text is not None else file.unlink()
    assert run_folder.resolve_checkpoint(tmp_path, "last") == path
    run_folder.rate_checkpoint(path, 2.0)
    add(tmp_path, 6)
    assert list(manifest(tmp_path)) == ["step-000006.ckpt"]


def test_a_checkpoint_that_is_longer_is_damaged_under_every_name(tmp_path):
    path = add(tmp_path, 3)
    with path.open("ab") as file:
        file.write(b"more")
    for asked in ("last", str(path), str(path.with_name("last.ckpt"))):
        with pytest.raises(UsageError) as refusal:
            run_folder.resolve_checkpoint(tmp_path, asked)
        assert str(refusal.value) == f"{path}: damaged, it is not what manifest.json says was written"


def nothing(_: Path) -> None:
    """Any file can be read."""


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_going_on_passes_over_what_is_damaged(tmp_path):
    """As far back as it must, and what cannot be read counts as damaged too; the pointer comes first."""
    assert run_folder.find_last(tmp_path, nothing) == (None, {})
    first, second, third = (add(tmp_path, step, "content" * 9) for step in (3, 6, 9))
    assert run_folder.find_last(tmp_path, nothing) == (third, {})
    flip(third)
    fault = f"{third}: damaged, it is not what manifest.json says was written"
    assert run_folder.find_last(tmp_path, nothing) == (second, {third: fault})

    def refuse(path: Path) -> None:
        if path == second:
            raise ValueError("no checkpoint")

    assert run_folder.find_last(tmp_path, refuse) == (first, {third: fault, second: "no checkpoint"})
    run_folder.point_last(second)
    assert run_folder.find_last(tmp_path, nothing) == (second, {})


def test_a_run_that_has_lost_everything_does_not_begin_anew(tmp_path):
    path = add(tmp_path, 3, "content" * 9)
    flip(path)
    with pytest.raises(UsageError, match=rf"no checkpoint to go on from: {path}: damaged, .*; begin anew in another"):
        run_folder.find_last(tmp_path, nothing)
    path.unlink()
    lost = f"{path.parent} has lost all that were saved"
    with pytest.raises(UsageError, match=lost):
        run_folder.find_last(tmp_path, nothing)
    (path.parent / "manifest.json").unlink()
    with pytest.raises(UsageError, match=lost):
        run_folder.find_last(tmp_path, nothing)  # last.ckpt names what is gone
    (path.parent / "last.ckpt").unlink()
    assert run_folder.find_last(tmp_path, nothing) == (None, {})


def test_what_is_quarantined_is_no_checkpoint_any_more(tmp_path):
    first, second = add(tmp_path, 3), add(tmp_path, 6)
    content = second.read_bytes()
    kept = run_folder.quarantine(second)
    assert (kept.name, kept.read_bytes()) == ("step-000006.ckpt.damaged", content)
    assert (steps_saved(tmp_path), run_folder.last_checkpoint(tmp_path)) == ([3], first)
    run_folder.prune(tmp_path, keep=1)
    assert list(manifest(tmp_path)) == ["step-000003.ckpt"]


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_a_flipped_byte_is_found_without_a_manifest(tmp_path, place):
    path = add(tmp_path, 3, "content" * 500)
    (path.parent / "manifest.json").unlink()
    assert run_folder.resolve_checkpoint(tmp_path, "last") == path
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match="damaged, what it holds is not what was written"):
        run_folder.resolve_checkpoint(tmp_path, "last")


def test_a_checkpoint_that_missed_the_manifest_is_entered(tmp_path):
    path = add(tmp_path, 3)
    written = manifest(tmp_path)
    (path.parent / "manifest.json").unlink()
    assert run_folder.describe_checkpoint(path) == written[path.name]
    assert manifest(tmp_path) == written
    run_folder.rate_checkpoint(path, 2.0)
    assert run_folder.describe_checkpoint(path)["val_perplexity"] == 2.0


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    path = add(tmp_path, 3)
    for other in (tmp_path / "config.yaml", tmp_path / "metrics.csv", path.with_name("step-000006.ckpt")):
        durable.temporary_name(other).write_text("half")
    run_folder.remove_unfinished(tmp_path)
    assert list(tmp_path.rglob(".*")) == []
    assert steps_saved(tmp_path) == [3]
    run_folder.remove_unfinished(tmp_path / "none")


def sharded(run: Path, step: int) -> Path:
    final = run_folder.step_path(run, step)
    new = final.with_name(f".{final.name}.new")
    for rank in range(3):
        write_whole(new / "checkpoint" / f"rank{rank}", f"shard {rank}")
    run_folder.add_checkpoint(new, final)
    return final


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: write_whole(folder / "checkpoint" / "rank1", "shard 9"), "checkpoint/rank1"),
        (lambda folder: (folder / "checkpoint" / "rank2").unlink(), "checkpoint/rank2"),
        (lambda folder: (folder / "more").write_text("x"), "more"),
    ],
)
def test_every_file_of_a_sharded_checkpoint_is_known(tmp_path, damage, named):
    path = sharded(tmp_path, 3)
    assert list(manifest(tmp_path)["step-000003.ckpt"]["files"]) == [
        f"step-000003.ckpt/checkpoint/rank{rank}" for rank in range(3)
    ]
    assert run_folder.resolve_checkpoint(tmp_path, "last") == path
    damage(path)
    with pytest.raises(UsageError) as refusal:
        run_folder.resolve_checkpoint(tmp_path, "last")
    assert str(refusal.value).startswith(f"{path / named}: damaged")


class Killed(BaseException):
    """Nothing may catch it."""


CHANGES = (
    (os, "replace"),
    (os, "fsync"),
    (shutil, "rmtree"),
    (Path, "unlink"),
    (Path, "symlink_to"),
    (Path, "write_text"),
)


def kill_at(patch: pytest.MonkeyPatch, moment: int) -> list[int]:
    """Let the process die just before its ``moment``-th change on disk; the list grows by each that it makes."""
    made: list[int] = []
    for owner, name in CHANGES:
        original = getattr(owner, name)

        def change(*arguments, original=original, **settings):
            if len(made) == moment:
                raise Killed
            made.append(moment)
            return original(*arguments, **settings)

        patch.setattr(owner, name, change)
    return made


def save_and_rate(run: Path, sharding: bool) -> None:
    """What happens at a checkpoint whose step is validated; the run has been here before."""
    path = sharded(run, 30) if sharding else add(run, 30, "second")
    run_folder.prune(run, keep=2)
    run_folder.rate_checkpoint(path, 1.0)
    run_folder.prune(run, keep=2)


@pytest.mark.parametrize("sharding", [False, True])
def test_killing_at_any_moment_leaves_a_run_that_goes_on(tmp_path, monkeypatch, sharding):
    """Earlier checkpoints, a best one among them, and one of the same step that is written once more."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a moment too, but nothing to wait for
    moment = 0
    while True:
        run = tmp_path / str(moment)
        for step, perplexity in ((10, 2.0), (20, 3.0), (30, 4.0)):
            run_folder.rate_checkpoint((sharded if sharding else add)(run, step), perplexity)
        with pytest.MonkeyPatch.context() as patch:
            made = kill_at(patch, moment)
            try:
                save_and_rate(run, sharding)
                finished = True
            except Killed:
                finished = False
        last = run_folder.resolve_checkpoint(run, "last")
        assert run_folder.step_of(last) in ((20, 30) if sharding else (30,))
        assert run_folder.resolve_checkpoint(run, "best") is not None
        save_and_rate(run, sharding)
        assert run_folder.resolve_checkpoint(run, "best") == run_folder.resolve_checkpoint(run, "last")
        assert [entry["val_perplexity"] for entry in manifest(run).values()] == [3.0, 1.0]
        if finished:
            break
        moment += 1
    assert len(made) > 10
