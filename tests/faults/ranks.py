"""Two ranks of a run, as a launcher starts them, that are killed all together or one of them alone."""

import os
import random
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.processes import Forked

from .runs import Place, log_of, tail

TIMEOUT = ("--trainer.timeout_minutes", "0.25")  # how long a rank waits for another that hangs


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; the first that ends badly speaks for all."""

    each: tuple[Forked, ...]

    def poll(self) -> int | None:
        """The exit code of one that has ended, a bad one before a good one."""
        codes = [code for rank in self.each if (code := rank.poll()) is not None]
        return next((code for code in codes if code), codes[0] if codes else None)

    def codes(self) -> list[int]:
        """All exit codes, once there are any."""
        return [rank.wait() for rank in self.each]

    def wait(self) -> int:
        """The first bad exit code, or 0."""
        return next((code for code in self.codes() if code), 0)

    def send(self, number: int, ranks: Sequence[int] = (0, 1)) -> None:
        """Send a signal to some of them that are still there."""
        for rank in ranks:
            if self.each[rank].poll() is None:
                os.kill(self.each[rank].pid, number)


@dataclass(frozen=True)
class TwoRanks:
    """A place where two ranks train.

    Attributes:
        place: What they train on.
        strategy: Under which.
    """

    place: Place
    strategy: str = "ddp"

    def start(self, run: Path, *options: str, second: Sequence[str] = ()) -> Ranks:
        """Train, going on from what there is; the second rank may have options of its own besides."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
        asked = ["--trainer.devices", "2", "--trainer.strategy", self.strategy, *options]
        own = [(), second]
        return Ranks(
            tuple(self.place.start(run, *asked, *own[rank], **shared, LOCAL_RANK=str(rank)) for rank in range(2))
        )

    def finish(self, run: Path) -> None:
        """Train to the end."""
        assert self.start(run).wait() == 0, tail(run)


@dataclass
class Killer:
    """Kills both ranks, or one alone: then the other must leave, soon, and say whom it has lost.

    Attributes:
        alone: Whether one alone is killed, time after time.
        moments: Which one.
        most: Seconds that the other may take.
    """

    alone: Iterator[bool]
    moments: random.Random
    most: float = 15

    def __call__(self, ranks: Ranks, run: Path) -> bool:
        """Kill; whether they were still there."""
        if next(self.alone):
            return self._kill_one(ranks, run)
        ranks.send(signal.SIGKILL)
        return -signal.SIGKILL in ranks.codes()

    def _kill_one(self, ranks: Ranks, run: Path) -> bool:
        killed = self.moments.randrange(2)
        ranks.send(signal.SIGKILL, [killed])
        sent = time.monotonic()
        code = ranks.each[1 - killed].wait()
        assert time.monotonic() - sent < self.most, tail(run)
        if ranks.each[killed].wait() == 0 or code == 0:
            return False  # they were about to end
        said = [line for line in log_of(run).read_text().splitlines() if f"rank {1 - killed} of 2 ends" in line]
        assert said and "for it has lost another" in said[-1], tail(run)
        return True
