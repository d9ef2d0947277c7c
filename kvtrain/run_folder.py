"""A run on disk: ``config.yaml``, ``metrics.csv`` and ``checkpoints/``; what ``last`` means, and what differs."""

import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import yaml

from kvtrain.mistakes import UsageError

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
LAST = "last.ckpt"
LAST_KEYWORD = "last"
_STEP = re.compile(r"step-(\d+)\.ckpt")


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 where it has none."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def step_files(run: Path) -> list[Path]:
    """Checkpoints of a run that carry a step in their name, the latest written last."""
    folder = run / CHECKPOINTS
    files = [path for path in folder.glob("step-*.ckpt") if step_of(path) >= 0]
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, step_of(path)))


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; a file under its final name is always complete."""
    last = run / CHECKPOINTS / LAST
    if last.exists():
        return last.resolve() if last.is_symlink() else last
    files = step_files(run)
    return files[-1] if files else None


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
        asked: ``last`` or a path.

    Raises:
        UsageError: No such checkpoint, or it is damaged.
    """
    path = last_checkpoint(run) if asked == LAST_KEYWORD else Path(asked)
    if path is None:
        return None
    if not path.exists():
        raise UsageError(f"no checkpoint at '{asked}'; give 'last' or a file such as {run}/{CHECKPOINTS}/{LAST}")
    if path.is_file() and not zipfile.is_zipfile(path):
        others = [str(other) for other in step_files(run) if other.resolve() != path.resolve()]
        hint = f"; try --ckpt_path {others[-1]}" if others else ""
        raise UsageError(f"{path}: damaged or no checkpoint of kvtrain{hint}")
    return path


def publish(temporary: Path, final: Path) -> None:
    """Give a completely written file or folder its name, in one step; replaces what was there."""
    if temporary.is_file():
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    if final.is_dir() and not final.is_symlink():
        shutil.rmtree(final)
    os.replace(temporary, final)


def point_last(target: Path) -> None:
    """Make ``last.ckpt`` beside a checkpoint name it: a link, or a copy where links cannot be made."""
    temporary = target.parent / f".{LAST}.new"
    remove(temporary)
    try:
        temporary.symlink_to(target.name)
    except OSError:
        shutil.copy2(target, temporary)
    publish(temporary, target.parent / LAST)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, never the one that ``last.ckpt`` names."""
    last = last_checkpoint(run)
    for path in step_files(run)[:-keep]:
        if last is None or path.resolve() != last.resolve():
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_config(run: Path, text: str) -> None:
    """Write ``config.yaml``; a reader never sees half of it."""
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / f".{CONFIG}.new"
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, run / CONFIG)


def read_config(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run; empty where there is none that can be read."""
    try:
        return parse_config((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}


def parse_config(text: str) -> dict[str, Any]:
    """A resolved recipe as plain values."""
    content = yaml.safe_load(text)
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
