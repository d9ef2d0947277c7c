"""Runs the sections one after the other, each in a process of its own, and goes on whatever becomes of one.

benchmarks/gpu_all.sh is the door. Nothing here needs more than Python: packages may come from a folder of wheels.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.results import DONE, Results
from benchmarks.gpu.sections import SECTIONS, Section
from benchmarks.gpu.wheels import provide

ROOT = Path(__file__).resolve().parents[2]
CUT, LOST = 3, 4  # child.py's exit codes
GRACE = 10  # seconds that a section has to notice that its time is over
START = 120  # seconds that the head of the results may take: the first import of torch is slow on a cold disk


def parser() -> argparse.ArgumentParser:
    """The options."""
    sections = "\n".join(f"  {part.name:18}{part.about} (at most {part.seconds} s)" for part in SECTIONS)
    options = argparse.ArgumentParser(
        prog="benchmarks/gpu_all.sh",
        description="Run tests/gpu and short measurements on a GPU, and write a dated file of results.",
        epilog=f"sections, in this order:\n{sections}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [section.name for section in SECTIONS]
    wheels = os.environ.get("KVTRAIN_WHEELS")
    options.add_argument("--cpu", action="store_true", help="run reduced, without a GPU: nothing is measured")
    options.add_argument("--sections", nargs="+", choices=names, default=names, metavar="NAME", help="run these alone")
    options.add_argument("--resume", action="store_true", help="go on with the newest file; what is done is left out")
    options.add_argument("--minutes", type=float, default=10.0, help="for all of it (default: 10)")
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the file")
    options.add_argument(
        "--wheels", type=Path, default=wheels, help="folder with what is not installed (default: KVTRAIN_WHEELS)"
    )
    options.add_argument("--commit", help="what is measured, where the copy has no git folder")
    return options


def commit() -> str:
    """Of the working tree, in words."""
    git = ["git", "-C", str(ROOT)]
    try:
        named = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git here"
    return named.stdout.strip() + (" and uncommitted changes" if changed.stdout.strip() else "")


def run_child(command: list[str], seconds: float, write: Callable[[str], None], log: Path) -> int | None:
    """Pass on the lines of a process; returns its exit code, None where it had to be stopped."""
    with log.open("ab") as errors:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        assert child.stdout is not None
        reader = threading.Thread(
            target=lambda lines: [write(line.rstrip("\n")) for line in lines], args=[child.stdout]
        )
        reader.start()
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None or child.returncode:
                _stop(child.pid)
            child.wait()
            reader.join(GRACE)


def _stop(group: int) -> None:
    """A child, and the compilers that it may have left."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


class Lines:
    """Passes on the lines of a section, and keeps the number of steps that it has made when it lost its device.

    Args:
        write: Where lines go.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write, self.steps = write, 0

    def take(self, line: str) -> None:
        """A line."""
        if line.startswith("!"):
            self.steps = int(line[1:])
            self.write(f"  error: the device was lost at step {self.steps}; a new process goes on")
        else:
            self.write(line)


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:240] if lines else "it said nothing"


def run_section(section: Section, python: str, results: Results, seconds: float, options: list[str], log: Path) -> bool:
    """Run one, and write how it ended; returns whether it did well."""
    results.write(f"\n== {section.name}: {section.about}")
    began, before, code, skip = time.monotonic(), results.trouble, LOST, 0
    while code == LOST:  # a new process goes on behind what the old one did last
        lines, left = Lines(results.write), seconds - (time.monotonic() - began)
        command = [python, "-m", "benchmarks.gpu.child", section.name, str(left), str(skip), *options]
        code = run_child(command, max(0.0, left) + GRACE, lines.take, log)
        if code == LOST and lines.steps <= skip:
            break
        skip = lines.steps
    took = f"{time.monotonic() - began:.0f} s"
    if code == 0:
        results.write(f"{DONE.format(name=section.name)} in {took}")
    elif code in (None, CUT):
        results.write(f"-- {section.name}: cut off after {took}")
    else:
        results.write(f"-- {section.name}: error: exit code {code} after {took}: {last_line(log)}")
    return code == 0 and results.trouble == before


def begin(python: str, results: Results, options: list[str], log: Path, named: str | None, notes: list[str]) -> None:
    """Write the head.

    Raises:
        ValueError: There is no device, or no torch.
    """
    head: list[str] = []
    command = [python, "-m", "benchmarks.gpu.child", "machine", str(START), "0", *options]
    if run_child(command, START, head.append, log) != 0:
        reason = last_line(log)
        if not results.path.exists():
            log.unlink()
        raise ValueError(reason)
    today = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    for line in (" ".join(["$ benchmarks/gpu_all.sh", *options]), f"commit {named or commit()}, {today} UTC", *head):
        results.write(line)
    for note in notes:
        results.write(note)


def run(asked: argparse.Namespace) -> int:
    """Everything that is asked for; returns the exit code."""
    ends = time.monotonic() + 60 * asked.minutes
    options, scale = ["--cpu"] if asked.cpu else [], asked.minutes / 10
    results = Results.open(asked.results, "gpu-cpu" if asked.cpu else "gpu", resume=asked.resume)
    log = results.path.with_suffix(".log")
    python, notes = sys.executable, []
    if asked.wheels:
        found, notes = provide(Path(asked.wheels).resolve(), ROOT / "build" / "gpu_all")
        python = str(found)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    begin(python, results, options, log, asked.commit, notes)
    well = True
    for section in SECTIONS:
        if section.name not in asked.sections or (asked.resume and results.is_done(section.name)):
            continue
        seconds = min(section.seconds * scale, ends - time.monotonic() - GRACE)
        if seconds <= 0:
            results.write(f"\n== {section.name}: not run: no time left; go on with --resume")
            well = False
        else:
            well &= run_section(section, python, results, seconds, options, log)
    results.write(f"\n{'all of it ran well' if well else 'not all of it ran well'}; details in {log.name}")
    return 0 if well else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a mistake is answered in a line, with exit code 2."""
    asked = parser().parse_args(argv)
    try:
        return run(asked)
    except ValueError as error:
        print(f"gpu_all: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
