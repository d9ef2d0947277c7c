"""benchmarks/gpu_all.sh: what it runs, that nothing stops it, and that it says what it did not do."""

import importlib
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import benchmarks.gpu.__main__ as gpu_all
from benchmarks.gpu.kernel_tests import Reporter
from benchmarks.gpu.measure import Bench, DeviceLostError
from benchmarks.gpu.results import Results
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.wheels import install, provide, requirement

NAMES = [section.name for section in SECTIONS]


def bench(lines, seconds=60.0):
    return Bench(torch.device("cpu"), seconds, lines.append, small=True)


@pytest.fixture
def ending(monkeypatch):
    """How sections end, by name; those that are not named end well. Returns the names of those that ran."""
    codes, ran = {}, []

    def run_child(command, seconds, write, log):
        log.write_text("Traceback\nout of luck\n")
        name = command[3]
        ran.append(name)
        write(f"  figures of {name}")
        return codes.get(name, 0)

    monkeypatch.setattr(gpu_all, "run_child", run_child)
    return SimpleNamespace(codes=codes, ran=ran)


def test_every_file_of_tests_has_a_section(root):
    files = [name for section in SECTIONS if section.module == "kernel_tests" for name in section.arguments]
    assert sorted(files) == sorted(path.name for path in (root / "tests" / "gpu").glob("test_*.py"))


def test_sections_can_be_run_and_stay_under_ten_minutes():
    for section in SECTIONS:
        assert callable(importlib.import_module(f"benchmarks.gpu.{section.module}").run)
    assert NAMES[:3] == ["kernels", "forms", "attention"] and len(set(NAMES)) == len(NAMES)
    assert sum(section.seconds for section in SECTIONS) <= 560


def test_nothing_stops_it(ending, tmp_path, capsys):
    """A section that dies, and one that hangs; both are told in a line, and the rest runs."""
    ending.codes.update({"forms": 1, "attention": None, "loss": gpu_all.CUT})
    assert gpu_all.main(["--cpu", "--results", str(tmp_path), "--commit", "abc"]) == 1
    assert ending.ran == ["machine", *NAMES]
    (file,) = tmp_path.glob("*-gpu-cpu.txt")
    text = file.read_text()
    assert text.startswith("$ benchmarks/gpu_all.sh --cpu\ncommit abc, 20")
    assert "-- kernels: done in 0 s" in text and "  figures of linear-attention\n" in text
    assert "-- forms: error: exit code 1 after 0 s: out of luck" in text
    assert "-- attention: cut off after 0 s" in text and "-- loss: cut off after 0 s" in text
    assert capsys.readouterr().out == text

    ending.codes.clear()
    ending.ran.clear()
    assert gpu_all.main(["--cpu", "--results", str(tmp_path), "--resume"]) == 0
    assert ending.ran == ["machine", "forms", "attention", "loss"]
    assert list(tmp_path.glob("*.txt")) == [file] and file.read_text().count("$ benchmarks") == 2

    assert gpu_all.main(["--cpu", "--results", str(tmp_path), "--sections", "loss"]) == 0
    assert len(list(tmp_path.glob("*.txt"))) == 2


def test_a_failure_in_a_section_is_a_failure_of_the_whole(ending, tmp_path, monkeypatch):
    said = {"decode": "  1 row: error: RuntimeError: no", "forms": "  failed: test_forms.py::test_x: wrong"}
    monkeypatch.setattr(gpu_all, "run_child", lambda command, _, write, log: write(said.get(command[3], "  fine")) or 0)
    ran = [
        gpu_all.main(["--cpu", "--results", str(tmp_path), "--sections", name]) for name in ("loss", "decode", "forms")
    ]
    assert ran == [0, 1, 1]


def test_when_time_is_over_the_rest_is_not_run(ending, tmp_path):
    assert gpu_all.main(["--cpu", "--results", str(tmp_path), "--minutes", "0.1"]) == 1
    assert ending.ran == ["machine"]
    (file,) = tmp_path.glob("*.txt")
    assert file.read_text().count("not run: no time left; go on with --resume") == len(NAMES)


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["--resume"], "holds no results to go on with; leave out --resume"),
        (["--wheels", "nowhere"], "nowhere holds no wheels"),
    ],
)
def test_mistakes_are_answered_in_a_line(argv, answer, ending, tmp_path, capsys):
    assert gpu_all.main(["--cpu", "--results", str(tmp_path), *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu_all: ") and answer in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_a_device_nothing_is_written(ending, tmp_path, capsys):
    ending.codes["machine"] = 2
    assert gpu_all.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "gpu_all: out of luck\n"
    assert list(tmp_path.iterdir()) == []


def test_a_process_hands_its_lines_on_and_is_stopped_in_time(tmp_path):
    lines, log = [], tmp_path / "log"
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    assert gpu_all.run_child([sys.executable, "-c", code], 60, lines.append, log) == 3
    assert lines == ["one"] and gpu_all.last_line(log) == "two"
    began = time.monotonic()
    sleeper = [sys.executable, "-c", "import time; print('zzz', flush=True); time.sleep(60)"]
    assert gpu_all.run_child(sleeper, 0.5, lines.append, log) is None
    assert lines == ["one", "zzz"] and time.monotonic() - began < 30


def test_a_measurement_that_fails_is_a_line():
    lines = []
    section = bench(lines)
    section.measure("sum", lambda: 1 / 0)
    section.measure("product", lambda: "6")
    section.seconds = 0.0
    assert not section.cut
    section.measure("rest", lambda: "7")
    assert section.cut
    assert lines == [
        "  sum: error: ZeroDivisionError: division by zero",
        "  product: 6",
        "  rest: not run: no time left",
    ]


def test_a_lost_device_ends_a_process_and_the_next_one_skips_what_is_done(monkeypatch):
    lines = []
    first = bench(lines)
    monkeypatch.setattr(first, "lost", lambda: first.step == 2)
    first.measure("one", lambda: "1")
    with pytest.raises(DeviceLostError):
        first.measure("two", lambda: 1 / 0)
    second = Bench(first.device, 60.0, lines.append, small=True, skip=first.step)
    for name in ("one", "two", "three"):
        second.measure(name, lambda: "again")
    assert lines == ["  one: 1", "  two: error: ZeroDivisionError: division by zero", "  three: again"]


def test_a_section_goes_on_in_a_new_process(ending, tmp_path, monkeypatch):
    """Until it is done, or no step is made any more."""
    skips = []

    def run_child(command, seconds, write, log):
        log.write_text("gone")
        if command[3] == "machine":
            return 0
        skips.append(int(command[5]))
        if command[3] == "loss" and skips[-1] == 9:
            return 0
        write(f"!{skips[-1] + 4 if skips[-1] == 0 else 9}")
        return gpu_all.LOST

    monkeypatch.setattr(gpu_all, "run_child", run_child)
    assert gpu_all.main(["--cpu", "--results", str(tmp_path), "--sections", "loss", "decode"]) == 1
    assert skips == [0, 4, 9] * 2
    (file,) = tmp_path.glob("*.txt")
    assert "-- loss: done" in file.read_text() and "-- decode: error: exit code 4 after 0 s: gone" in file.read_text()
    assert file.read_text().count("error: the device was lost at step 4; a new process goes on") == 2


def test_tests_that_another_process_ran_are_left_out_and_a_lost_device_stops_them(monkeypatch):
    section = bench([])
    section.skip = 2
    reporter, session = Reporter(section), SimpleNamespace(items=list("abcd"), shouldstop=False)
    reporter.pytest_collection_finish(session)
    assert session.items == ["c", "d"]
    monkeypatch.setattr(section, "lost", lambda: True)
    item = SimpleNamespace(session=session)
    reporter.pytest_runtest_teardown(item, item)
    assert not session.shouldstop  # nobody asks a device after a test that passed
    reporter.pytest_runtest_logreport(report("failed", "illegal memory access"))
    reporter.pytest_runtest_teardown(item, item)
    assert session.shouldstop and reporter.lost and section.step == 4


def report(outcome, longrepr=None, when="call"):
    name = "tests/gpu/test_x.py::test_y"
    return pytest.TestReport(name, ("test_x.py", 1, "test_y"), {}, outcome, longrepr, when)


def test_tests_are_counted_and_failures_are_lines():
    lines = []
    reporter = Reporter(bench(lines))
    for outcome, when in (("passed", "setup"), ("passed", "call"), ("passed", "teardown")):
        reporter.pytest_runtest_logreport(report(outcome, when=when))
    reporter.pytest_runtest_logreport(report("failed", "assert 1\n == 2"))
    for _ in range(2):
        reporter.pytest_runtest_logreport(report("skipped", ("f.py", 3, "Skipped: needs flash-attn"), "setup"))
    assert lines == ["  failed: test_x.py::test_y: assert 1 == 2"]
    assert reporter.lines() == ["  1 passed, 1 failed", "  2 not run: needs flash-attn"]


def test_tests_stop_when_time_is_over():
    session = SimpleNamespace(shouldstop=False)
    item = SimpleNamespace(session=session)
    in_time, late = bench([]), bench([], seconds=0.0)
    Reporter(in_time).pytest_runtest_teardown(item, item)
    assert not session.shouldstop and not in_time.cut
    Reporter(late).pytest_runtest_teardown(item, None)
    assert not session.shouldstop
    Reporter(late).pytest_runtest_teardown(item, item)
    assert session.shouldstop and late.cut


def test_results_of_a_day_are_numbered(tmp_path):
    first = Results.open(tmp_path, "gpu", resume=False)
    first.write("-- loss: done in 3 s")
    assert Results.open(tmp_path, "gpu", resume=False).path.name == first.path.name.replace(".txt", "-2.txt")
    again = Results.open(tmp_path, "gpu", resume=True)
    assert again.path == first.path and again.is_done("loss") and not again.is_done("decode")


def test_packages_have_the_projects_bounds():
    assert requirement("transformers") == "transformers>=5.17"
    assert requirement("flash-attn") == "flash-attn>=2.8"
    assert requirement("liger-kernel") == "liger-kernel>=0.8"
    assert requirement("flash-linear-attention") == "flash-linear-attention>=0.6"
    assert requirement("numpy") == "numpy"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_without_a_gpu(root, tmp_path):
    """Every section to its end, nothing fails, and what needs a device is said not to have run."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(root / "benchmarks" / "gpu_all.sh"), "--cpu", "--minutes", "60", "--results", str(tmp_path)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    (file,) = tmp_path.glob("*.txt")
    text = file.read_text()
    assert result.returncode == 0, text + result.stderr
    assert [name for name in NAMES if f"\n-- {name}: done in " not in text] == []
    assert "error" not in text and "  failed: " not in text
    head, *sections = text.split("\n== ")
    assert "no CUDA device: tiny shapes, whose figures say nothing\n" in head
    assert f"torch {torch.__version__.split('+')[0]}" in head and "commit " in head
    found = {section.partition(":")[0]: section for section in sections}
    for name in ("kernels", "forms", "attention"):
        assert " passed, 0 failed\n" in found[name]
    for name in ("train-small", "train-large", "loss"):
        assert "memory not run: no CUDA device" in found[name]
    for name in ("DMC", "LCKV", "Duo", "TransNormer"):
        assert f", {name}: " in found["train-small"] and f", {name}, rows 1: " in found["decode"]
    assert "  liger: not run: no CUDA device\n" in found["loss"] or "liger-kernel is not installed" in found["loss"]
    assert "  triton: not run: no CUDA device\n" in found["linear-attention"]
    assert "  fla: not run: " in found["linear-attention"]


@pytest.mark.slow
def test_missing_packages_come_from_wheels(tmp_path):
    """A package that no index has, into an environment that sees this one's packages; without its wheel, a line."""
    name = "kvtrain_wheel_of_a_test"
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, name)
    python, problems = provide(wheels, tmp_path / "environment")
    assert install(python, wheels, name) is None
    asked = [str(python), "-c", f"import {name}, torch, pytest; print({name}.ANSWER, torch.__file__)"]
    said = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    assert said == ["42", torch.__file__]
    assert "flash-attn: no wheel fits: ERROR: No matching distribution found for flash-attn>=2.8" in problems
    assert subprocess.run([sys.executable, "-c", f"import {name}"], check=False, capture_output=True).returncode == 1


def write_wheel(folder, name):
    import zipfile

    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "ANSWER = 42\n")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
