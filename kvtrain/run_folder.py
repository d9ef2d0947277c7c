"""A run on disk: ``config.yaml``, ``metrics.csv`` and ``checkpoints/``; what ``last`` and ``best`` mean, what differs.

``checkpoints/manifest.json`` says of every checkpoint its step, its held-out perplexity where that was measured,
and size and SHA-256 of its files. It is written after the checkpoint and only ever says more than the files do:
a run whose manifest is missing, behind or unreadable goes on, its checkpoints unverified.
"""

import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kvtrain import strict_yaml
from kvtrain.durable import files_in, publish, remove, remove_leftovers, replacing, sha256, write_text
from kvtrain.errors import UsageError
from kvtrain.renamed import OLD_NAMES, with_new_names

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
LAST, BEST = "last.ckpt", "best.ckpt"
MANIFEST = "manifest.json"
DAMAGED = ".damaged"
_ENTRY = {"step", "val_perplexity", "files"}
_STEP = re.compile(r"step-(\d+)\.ckpt")


class Found(NamedTuple):
    """What a run goes on from.

    Attributes:
        path: The newest checkpoint that is whole; None where none was ever saved.
        faults: What is wrong with newer ones, by their paths.
    """

    path: Path | None
    faults: dict[Path, str]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 where it has none."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def step_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINTS / f"step-{step:06d}.ckpt"


def step_files(run: Path) -> list[Path]:
    """Checkpoints of a run that carry a step in their name, the latest written last."""
    folder = run / CHECKPOINTS
    files = [path for path in folder.glob("step-*.ckpt") if step_of(path) >= 0]
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, step_of(path)))


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; a file under its final name is always complete."""
    files = step_files(run)
    return _pointed(run / CHECKPOINTS / LAST) or (files[-1] if files else None)


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint of a run with the lowest held-out perplexity, or None where none was measured."""
    return _pointed(run / CHECKPOINTS / BEST)


def _pointed(pointer: Path) -> Path | None:
    if not pointer.exists():
        return None
    return pointer.resolve() if pointer.is_symlink() else pointer


def require_place(run: Path) -> None:
    """Make sure that a run folder is there or can be made.

    Raises:
        UsageError: A file is in its way, or the folder above may not be written.
    """
    there = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{run}: {there} is a file; choose another --trainer.default_root_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{run}: {there} may not be written; choose another --trainer.default_root_dir")


def remove_unfinished(run: Path) -> None:
    """Remove what an earlier process was writing when it was killed, which may be what fills the disk.

    Its ranks have ended, and those of a run that begins write nothing before all of them are there.
    """
    for folder in (run, run / CHECKPOINTS):
        remove_leftovers(folder)


def refuse_second_run(run: Path) -> None:
    """Stop a fresh run before it touches another one's checkpoints.

    Raises:
        UsageError: The folder holds checkpoints.
    """
    last = last_checkpoint(run)
    if last is not None:
        step = f"step {step_of(last)}" if step_of(last) >= 0 else last.name
        raise UsageError(
            f"{run} already holds a run ({step}); continue it with --ckpt_path last, "
            "or choose another --trainer.default_root_dir"
        )


def resolve_checkpoint(run: Path, asked: str) -> Path | None:
    """Turn ``--ckpt_path`` into a file; None where ``last`` is asked for and there is none yet.

    Args:
        run: The run folder.
        asked: ``last``, ``best`` or a path.

    Raises:
        UsageError: No such checkpoint, or it is damaged.
    """
    found = {"last": last_checkpoint, "best": best_checkpoint}
    path = found[asked](run) if asked in found else Path(asked)
    if path is None and asked == "best":
        raise UsageError(
            f"{run} has no best checkpoint: none was measured on the held-out text; give 'last', and let "
            "validations fall on steps that trainer.checkpoint_every saves"
        )
    if path is None:
        return None
    if not path.exists():
        raise UsageError(f"no checkpoint at '{asked}'; give 'last', 'best' or a file such as {step_path(run, 100)}")
    require_intact(path, run, "--ckpt_path ")
    return path


def require_intact(path: Path, run: Path, option: str = "") -> None:
    """Make sure that a checkpoint is what was written.

    Args:
        path: The checkpoint.
        run: Run folder in which others may lie.
        option: What stands before a checkpoint on the command line.

    Raises:
        UsageError: It is damaged, or none; with another one to try.
    """
    if fault := _fault(path):
        others = [str(other) for other in step_files(run) if other.resolve() != path.resolve()]
        hint = f"; try {option}{others[-1]}" if others else ""
        raise UsageError(f"{fault}{hint}")


def find_last(run: Path, read: Callable[[Path], object]) -> Found:
    """The checkpoint that ``--ckpt_path last`` goes on from: the newest that is whole.

    Args:
        run: The run folder.
        read: Opens a checkpoint, and raises ValueError where that cannot be done.

    Raises:
        UsageError: There were checkpoints, and none is left that is whole.
    """
    faults: dict[Path, str] = {}
    newest = [path for path in (last_checkpoint(run),) if path]
    for path in dict.fromkeys(path.resolve() for path in [*newest, *reversed(step_files(run))]):
        try:
            fault = _fault(path)
            fault or read(path)
        except ValueError as error:
            fault = str(error)
        if fault is None:
            return Found(path, faults)
        faults[path] = fault
    folder = run / CHECKPOINTS
    if faults or (folder / LAST).is_symlink() or read_manifest(folder):
        found = "; ".join(faults.values()) or f"{folder} has lost all that were saved"
        raise UsageError(f"no checkpoint to go on from: {found}; begin anew in another --trainer.default_root_dir")
    return Found(None, {})


def quarantine(path: Path) -> Path:
    """Take a damaged checkpoint out of a run without removing it; returns where it lies now."""
    kept = path.with_name(path.name + DAMAGED)
    publish(path, kept)
    return kept


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint that is there, or None."""
    if path.is_dir() and (not _files(path) or (path / CHECKPOINTS).is_dir()):
        return f"{path}: a folder that is no checkpoint; give 'last', 'best' or a file such as {step_path(path, 100)}"
    if path.is_file() and not zipfile.is_zipfile(path):
        return f"{path}: damaged or no checkpoint of kvtrain"
    path = path.resolve()
    entry = read_manifest(path.parent).get(path.name)
    if entry is None:
        return f"{path}: damaged, what it holds is not what was written" if _checksums_differ(path) else None
    changed = _first_change(path, entry["files"])
    return changed and f"{path.parent / changed}: damaged, it is not what {MANIFEST} says was written"


def _checksums_differ(path: Path) -> bool:
    """Whether a checkpoint that no manifest knows is other than its own archive's checksums say."""
    try:
        return path.is_file() and zipfile.ZipFile(path).testzip() is not None
    except (OSError, zipfile.BadZipFile):
        return True


def _first_change(path: Path, recorded: dict[str, dict[str, Any]]) -> str | None:
    """The first file of a checkpoint that is missing, foreign or of other content; sizes first, they cost nothing."""
    sizes, written = _sizes(path), {name: file["bytes"] for name, file in recorded.items()}
    if sizes != written:
        return next(name for name in {**written, **sizes} if sizes.get(name) != written.get(name))
    hashes = _hashes(path)
    return next((name for name in recorded if hashes[name] != recorded[name]["sha256"]), None)


def add_checkpoint(temporary: Path, final: Path, digest: str | None = None) -> None:
    """Take a completely written checkpoint into a run: its name, ``last.ckpt``, and its place in the manifest.

    Args:
        temporary: The file or folder.
        final: What it shall be called.
        digest: SHA-256 of a single file, where it is known from writing it; otherwise what was written is read.

    Raises:
        OSError: The run's disk is full, or may not be written.
    """
    manifest = read_manifest(final.parent)
    if manifest.pop(final.name, None):  # a file of the same name with other bytes would pass for damaged
        _write_manifest(final.parent, manifest)
    publish(temporary, final)
    point_last(final)
    describe_checkpoint(final, digest)


def describe_checkpoint(path: Path, digest: str | None = None) -> dict[str, Any]:
    """A checkpoint's entry in the manifest, which is written where there is none yet.

    Args:
        path: The file or folder.
        digest: As for ``add_checkpoint``.
    """
    manifest = read_manifest(path.parent)
    if path.name not in manifest:
        sizes, hashes = _sizes(path), {path.name: digest} if digest else _hashes(path)
        files = {name: {"bytes": size, "sha256": hashes[name]} for name, size in sizes.items()}
        manifest[path.name] = {"step": step_of(path), "val_perplexity": None, "files": files}
        _write_manifest(path.parent, manifest)
    return manifest[path.name]


def rate_checkpoint(path: Path, val_perplexity: float) -> None:
    """Note a checkpoint's held-out perplexity, and make ``best.ckpt`` name the best one so far."""
    manifest = read_manifest(path.parent)
    if path.name not in manifest or not math.isfinite(val_perplexity):
        return
    manifest[path.name]["val_perplexity"] = val_perplexity
    _write_manifest(path.parent, manifest)
    refresh_best(path.parent)


def refresh_best(checkpoints: Path) -> None:
    """Make ``best.ckpt`` name the checkpoint of the lowest perplexity that is still there, if one was rated."""
    entries = read_manifest(checkpoints).items()
    present = {name: entry["val_perplexity"] for name, entry in entries if (checkpoints / name).exists()}
    rated = {name: rating for name, rating in present.items() if rating is not None}
    if rated:
        point_best(checkpoints / min(rated, key=rated.__getitem__))


def read_manifest(checkpoints: Path) -> dict[str, dict[str, Any]]:
    """What is known of the checkpoints in a folder, by name; empty where there is no manifest that can be read."""
    try:
        content = json.loads((checkpoints / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict) and entry.keys() >= _ENTRY}


def _write_manifest(checkpoints: Path, manifest: dict[str, dict[str, Any]]) -> None:
    write_text(checkpoints / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _files(path: Path) -> dict[str, Path]:
    """The files of a checkpoint, which is one itself or a folder of them, by their names beside the manifest."""
    return {file.relative_to(path.parent).as_posix(): file for file in files_in(path)}


def _sizes(path: Path) -> dict[str, int]:
    return {name: file.stat().st_size for name, file in _files(path).items()}


def _hashes(path: Path) -> dict[str, str]:
    files = _files(path)
    return dict(zip(files, sha256(list(files.values())), strict=True))


def point_last(target: Path) -> None:
    """Make ``last.ckpt`` beside a checkpoint name it."""
    _point(LAST, target)


def point_best(target: Path) -> None:
    """Make ``best.ckpt`` beside a checkpoint name it."""
    _point(BEST, target)


def _point(name: str, target: Path) -> None:
    """A link, or a copy where links cannot be made."""
    with replacing(target.parent / name) as temporary:
        remove(temporary)
        try:
            temporary.symlink_to(target.name)
        except OSError:
            shutil.copytree(target, temporary) if target.is_dir() else shutil.copy2(target, temporary)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, never those that ``last.ckpt`` and ``best.ckpt`` name."""
    named = [path.resolve() for path in (last_checkpoint(run), best_checkpoint(run)) if path]
    for path in step_files(run)[:-keep]:
        if path.resolve() not in named:
            remove(path)
    manifest = read_manifest(run / CHECKPOINTS)
    left = {name: entry for name, entry in manifest.items() if (run / CHECKPOINTS / name).exists()}
    if left != manifest:
        _write_manifest(run / CHECKPOINTS, left)


def write_config(run: Path, text: str) -> None:
    """Write ``config.yaml``; a reader never sees half of it."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / CONFIG, text)


def read_config(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run; empty where there is none that can be read."""
    try:
        return parse_config((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}


def parse_config(text: str) -> dict[str, Any]:
    """A resolved recipe as plain values."""
    content = strict_yaml.load(text)
    content = with_new_names(content) if OLD_NAMES.search(text) else content
    return content if isinstance(content, dict) else {}


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """The dotted name of the first place where two parsed recipes differ, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(str(name), old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(index), *both) for index, both in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else key
    for name, before, after in pairs:
        inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        found = first_difference(before, after, inner)
        if found is not None:
            return found
    return None
