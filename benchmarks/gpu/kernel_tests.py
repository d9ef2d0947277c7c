"""The tests for a GPU, with a line for every failure as soon as it is known."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.measure import Bench, DeviceLostError

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[2]


class Reporter:
    """A plugin of pytest's.

    Args:
        bench: Where lines go, and how much time is left.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.passed, self.failed, self.skipped = bench, 0, 0, Counter[str]()
        self.lost = False

    def pytest_collection_finish(self, session: "pytest.Session") -> None:
        """Leave out what another process has run."""
        del session.items[: self.bench.skip]
        self.bench.step = self.bench.skip

    def pytest_collectreport(self, report: "pytest.CollectReport") -> None:
        """A file that could not be read."""
        if report.failed:
            self._fail(report)

    def pytest_runtest_logreport(self, report: "pytest.TestReport") -> None:
        """What one test came to."""
        self.passed += report.passed and report.when == "call"
        if report.failed:
            self._fail(report)
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def pytest_runtest_teardown(self, item: "pytest.Item", nextitem: "pytest.Item | None") -> None:
        """Stop when time is over, or the device is lost."""
        self.bench.step += 1
        self.lost = self.failed > 0 and self.bench.lost()
        if self.lost:
            item.session.shouldstop = "the device is lost"
        elif nextitem is not None and self.bench.left() <= 0:
            self.bench.cut = True
            item.session.shouldstop = "no time left"

    def _fail(self, report: "pytest.CollectReport | pytest.TestReport") -> None:
        self.failed += 1
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = " ".join((crash.message if crash else report.longreprtext).split())
        self.bench.write(f"  failed: {report.nodeid.removeprefix('tests/gpu/')}: {reason}"[:300])

    def lines(self) -> list[str]:
        """What all of them came to."""
        skipped = [f"  {count} not run: {reason}" for reason, count in self.skipped.items()]
        return [f"  {self.passed} passed, {self.failed} failed", *skipped]


def run(bench: Bench, *files: str) -> None:
    """Run some files of ``tests/gpu``: on a GPU all but the longest tests, without one the bodies that run anywhere."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        bench.write(f"  not run: {' and '.join(missing)} must be installed")
        return
    import pytest

    marks = "gpu and not slow" if bench.device.type == "cuda" else "not gpu and not slow"
    # The project's own options ask for plugins that may be missing.
    options = ["-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "--tb=short", "-q"]
    paths = [str(ROOT / "tests" / "gpu" / name) for name in files]
    reporter = Reporter(bench)
    code = pytest.main([*options, "--rootdir", str(ROOT), "-m", marks, *paths], plugins=[reporter])
    for line in reporter.lines():
        bench.write(line)
    if reporter.lost:
        raise DeviceLostError
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not bench.cut:
        raise RuntimeError(f"pytest ended with {code!r}")
