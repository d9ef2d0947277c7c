"""One process at a time writes into a run folder: ``run.lock`` in it names the owner.

The file appears with its content in one step, a hard link or an exclusive creation, which holds on network file systems
where ``flock`` may not. Whether the owner is alive can be told on its own host alone.
"""

import contextlib
import glob
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from kvtrain.errors import NO_ROOM, UsageError
from kvtrain.stop_signals import released

FILE_NAME = "run.lock"
_STALE = ".stale"  # ends the name of a lock that was taken away
_ATTEMPTS = 5  # others may take over, or leave, between two looks
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_held: set[Path] = set()  # by this process
logger = logging.getLogger("kvtrain")


@dataclass(frozen=True)
class Owner:
    """Who holds a run folder.

    Attributes:
        host: Its name.
        pid: Of the process.
        started: When the process began, in the system's own terms: a process number is given again. None where the
            system does not say.
        since: When it took the folder.
        job: SLURM's number of the job, which stays when the job is queued again; None elsewhere.
        restarts: How often SLURM had started it before; two starts of a job never run at once.
    """

    host: str
    pid: int
    started: str | None
    since: str
    job: str | None = None
    restarts: int = 0

    @classmethod
    def this_process(cls) -> "Owner":
        """The owner that this process would be."""
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()), now, job, int(restarts))

    def is_gone(self) -> bool:
        """Whether the process has certainly ended, as far as this host, or SLURM, can tell."""
        mine = Owner.this_process()
        if self.job is not None and self.job == mine.job and self.restarts < mine.restarts:
            return True
        if self.host != mine.host:
            return False
        if self.pid == mine.pid:  # whatever this process was before, it is not that now
            return True
        if not _is_there(self.pid):
            return True
        started = _start_of(self.pid)
        return None not in (started, self.started) and started != self.started


def _is_there(pid: int) -> bool:
    """Whether a process of this number runs here; also true where that cannot be told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


def _start_of(pid: int) -> str | None:
    """The boot and the tick of a process's beginning; that of a dead one that nobody has buried is a word."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = _BOOT.read_text().strip()
    except OSError:
        return None
    return "dead" if fields[0] in "ZX" else f"{boot} {fields[19]}"


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a run folder, which is made if need be; what was made and stayed empty is removed again.

    Where this process holds it already, nothing happens.

    Args:
        run: The folder.

    Raises:
        UsageError: Another process holds it.
        OSError: There is no room for the file.
    """
    held = run.resolve()
    if held in _held:
        yield
        return
    created = [folder for folder in (run, *run.parents) if not folder.exists()]
    text = json.dumps(asdict(Owner.this_process())) + "\n"

    def release() -> None:
        _held.discard(held)
        if _read(run / FILE_NAME) == text:
            (run / FILE_NAME).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in created:
                folder.rmdir()

    with released(release):
        run.mkdir(parents=True, exist_ok=True)
        _acquire(run / FILE_NAME, text)
        _held.add(held)
        _remove_drafts(run / FILE_NAME)
        yield


def _acquire(lock: Path, text: str) -> None:
    for _ in range(_ATTEMPTS):
        if _create(lock, text):
            return
        found = _read(lock)
        if found is None:
            continue  # gone between two looks
        owner = _parse(found)
        if owner is None or not owner.is_gone():
            _refuse(lock, owner)
        if _remove_stale(lock, found):
            logger.warning("%s: process %d of %s is gone, taken over", lock, owner.pid, owner.host)
    _refuse(lock, _parse(_read(lock) or ""))


def _draft(lock: Path, kind: str = "") -> Path:
    """A file beside the lock that is this process's own."""
    return lock.with_name(f".{lock.name}.{socket.gethostname()}.{os.getpid()}{kind}")


def _remove_drafts(lock: Path) -> None:
    """Remove such files of processes of this host that were killed before they could."""
    for path in lock.parent.glob(f".{lock.name}.{glob.escape(socket.gethostname())}.*"):
        number = path.name.removesuffix(_STALE).rpartition(".")[2]
        if number.isdecimal() and not _is_there(int(number)):
            path.unlink(missing_ok=True)


def _create(lock: Path, text: str) -> bool:
    """Make the file, whole, unless it is there."""
    draft = _draft(lock)
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, lock)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in NO_ROOM:
            raise OSError(error.errno, error.strerror, str(lock)) from error
        return _create_exclusively(lock, text)  # no hard links here
    finally:
        draft.unlink(missing_ok=True)
    return True


def _create_exclusively(lock: Path, text: str) -> bool:
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _remove_stale(lock: Path, found: str) -> bool:
    """Take a dead owner's file away; False where somebody else has done so and holds the folder now."""
    grave = _draft(lock, _STALE)
    try:
        os.replace(lock, grave)
    except FileNotFoundError:
        return False
    taken = _read(grave)
    if taken != found:  # it was alive: put it back
        _create(lock, taken or "")
    grave.unlink(missing_ok=True)
    return taken == found


def _read(lock: Path) -> str | None:
    try:
        return lock.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _parse(text: str) -> Owner | None:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _refuse(lock: Path, owner: Owner | None) -> NoReturn:
    holder = f"process {owner.pid} on {owner.host} since {owner.since}" if owner else f"another process, says {lock}"
    raise UsageError(
        f"{lock.parent} is in use by {holder}; wait for it, or choose another --trainer.default_root_dir; "
        f"if that process is gone for good, delete {lock}"
    )
