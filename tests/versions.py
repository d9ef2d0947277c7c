"""``make test-versions``: a named set of tests under the oldest, the pinned and the newest tested versions.

    python -m tests.versions [floor] [pinned] [newest] [today]

Each set lies in a thin environment of its own, ``.venv-<set>``, over the one that runs this: only what differs is
installed there. ``today`` is whatever the package index has by now: it reports, and its failures fail nothing.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = ("floor", "pinned", "newest", "today")

# Forms, conformance, generation, the contract, export, one training step of every architecture.
TESTS = (
    "tests/models/test_contract.py",
    "tests/models/test_host.py::test_save_and_load",
    "tests/models/test_host.py::test_full_generates_what_the_host_generates",
    "tests/models/test_versions.py",
)

# What today's set takes at its newest; torch stays, whose builds are the machine's business.
MOVING = ("transformers", "huggingface_hub", "tokenizers", "safetensors", "accelerate", "datasets", "lightning")


def environment(name: str) -> Path:
    """The interpreter of a set, its environment made anew."""
    if name == "pinned":
        return Path(sys.executable)
    folder = ROOT / f".venv-{name}"
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin/python"
    paths = [sysconfig.get_path("purelib"), str(ROOT)]
    place = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(place.strip()) / "base.pth").write_text("\n".join(paths) + "\n")
    wanted = ["-U", *MOVING] if name == "today" else ["-r", str(ROOT / f"constraints-{name}.txt")]
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted], check=True)
    return python


def run(name: str) -> bool:
    """Run the named tests under a set, and say how it went in a line."""
    try:
        python = environment(name)
    except subprocess.CalledProcessError as error:
        print(f"== {name}: could not be installed (pip ended with {error.returncode})", flush=True)
        return False
    shown = "import torch, transformers; print(f'torch {torch.__version__}, transformers {transformers.__version__}')"
    versions = subprocess.check_output([python, "-c", shown], text=True, cwd=ROOT).strip()
    print(f"== {name}: {versions}", flush=True)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", "--durations-min=10", *TESTS]
    passed = subprocess.run(command, check=False, cwd=ROOT).returncode == 0
    print(f"== {name}: {'passed' if passed else 'FAILED'} with {versions}", flush=True)
    return passed


def main(names: list[str]) -> int:
    """Run the sets, all by default; 1 where one that must pass did not."""
    if unknown := sorted(set(names) - set(SETS)):
        print(f"there is no set {unknown[0]!r}; there are {', '.join(SETS)}", file=sys.stderr)
        return 2
    passed = {name: run(name) for name in names or SETS}
    return int(not all(passed[name] for name in passed if name != "today"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
