"""Python programs in processes of their own: fresh ones, or forked from a server that has imported everything once."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KVTRAIN = "import runpy\nrunpy.run_module('kvtrain', run_name='__main__')\n"  # python -m kvtrain
PATIENCE = 280  # seconds, on a machine that may be busy

SERVER = multiprocessing.get_context("forkserver")
# No module of the tests, which the server could not find yet; DeepSpeed is imported by Lightning where it is there.
PRELOADED = ("kvtrain.training.cli", "kvtrain.data.module", "kvtrain.export.hf", "deepspeed")
SERVER.set_forkserver_preload([*PRELOADED, "transformers.models.llama.modeling_llama"])


class Fresh:
    """``python -c PROGRAM ARGUMENTS...``, as a user's shell starts it."""

    def __init__(self, program: str, arguments: list[str], log: Path) -> None:
        with log.open("a") as file:
            command = [sys.executable, "-c", program, *arguments]
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        self.pid, self.poll = self._process.pid, self._process.poll

    def wait(self) -> int:
        """The exit code; minus the signal's number of one that was killed."""
        return self._process.wait(PATIENCE)


class Forked:
    """The same, without the imports, and killed and ended in the same ways; its environment may have more in it."""

    def __init__(self, program: str, arguments: list[str], log: Path, **environment: str) -> None:
        surroundings = {**os.environ, **environment}
        self._process = SERVER.Process(target=_answer, args=(program, arguments, log, surroundings), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        return self._process.exitcode

    def wait(self) -> int:
        """The exit code; minus the signal's number of one that was killed."""
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, "the process goes on and on"
        return self._process.exitcode


Start = type[Fresh] | type[Forked]


def _answer(program: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """In the forked process, which is the server's child: be ``python -c PROGRAM ARGUMENTS...`` of the caller."""
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


def run(start: Start, program: str, arguments: list[str], log: Path) -> str:
    """Run a program to its end, which must be a good one, and return what it has printed."""
    code = start(program, arguments, log).wait()
    assert code == 0, log.read_text()[-3000:]
    return log.read_text()


def kill_when(ready: Callable[[], bool], start: Start, program: str, arguments: list[str], log: Path) -> None:
    """Start a program and kill it, without mercy, as soon as something has come true."""
    process, deadline = start(program, arguments, log), time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not ready():
        assert process.poll() is None, f"it ended before it could be killed: {log.read_text()[-3000:]}"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
