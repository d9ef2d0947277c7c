"""How many functions of kvtrain a training run calls, and how often a call leads into another file.

Counted by ``sys.setprofile`` from the start of ``kvtrain fit`` to just before its first training step, and for each
step (teacher, backward pass, optimiser, callbacks and the next batch included). A call is one of a function, method,
lambda or comprehension whose code lies in ``kvtrain/``, or a generator that goes on; bodies of modules and classes are
none. A move is a call whose file is not that of the call before. Other threads are not seen: on the CPU the backward
pass runs in the caller's own.

    python benchmarks/corridors.py                     # figures, and which functions are called most
    python benchmarks/corridors.py --most 100 --package ../older/kvtrain
    python benchmarks/corridors.py --config recipes/tiny/duo.yaml -- --data.batch_size 1
"""

import argparse
import inspect
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/tiny/dmc.yaml"
FIRST_STEP, LAST_STEP = 2, 6  # those that the mean is of; the first of all opens a phase
# A text that is the same under every Python, unlike the recipe's own; two rows; one batch of validation beforehand.
HELDOUT = str(ROOT / "kvtrain" / "assets" / "heldout.jsonl")
OPTIONS = ["--data.corpus", HELDOUT, "--data.validation_corpus", HELDOUT]
OPTIONS += ["--data.batch_size", "2", "--trainer.limit_val_batches", "1"]


@dataclass
class Stretch:
    """What was called between two marks.

    Attributes:
        codes: How often each function was called.
        moves: How often a call led into another file than the call before.
    """

    codes: Counter[CodeType] = field(default_factory=Counter)
    moves: int = 0

    @property
    def calls(self) -> int:
        """How many calls there were."""
        return self.codes.total()

    def by_function(self, package: Path) -> Counter[tuple[str, str]]:
        """Calls by file and function, such as ``("kernels/norm.py", "rms_norm")``."""
        counts: Counter[tuple[str, str]] = Counter()
        for code, times in self.codes.items():
            counts[str(Path(code.co_filename).relative_to(package)), code.co_qualname] += times
        return counts


class CallCounter:
    """A profile hook that counts the calls into a package, in stretches that the starts of training steps divide.

    Args:
        package: The package's folder.
    """

    def __init__(self, package: Path) -> None:
        self.stretches = [Stretch()]
        self._prefix = f"{package}/"
        self._file = ""

    def __enter__(self) -> "CallCounter":
        self._outer = sys.getprofile()
        sys.setprofile(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._outer)

    def _hook(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call":
            return
        if code.co_name == "_call_callback_hooks" and frame.f_locals["hook_name"] == "on_train_batch_start":
            self.stretches.append(Stretch())  # Lightning is about to begin a step
            self._file = ""
        elif code.co_flags & inspect.CO_NEWLOCALS and code.co_filename.startswith(self._prefix):
            stretch = self.stretches[-1]
            stretch.codes[code] += 1
            stretch.moves += self._file not in ("", code.co_filename)
            self._file = code.co_filename


def count_fit(package: Path, recipe: str, steps: int, options: Sequence[str] = ()) -> list[Stretch]:
    """Train, in this process and in a folder that is thrown away.

    Args:
        package: Folder of the ``kvtrain`` that is imported.
        recipe: Path of the recipe.
        steps: How many.
        options: More of the command line, after ``OPTIONS``.

    Returns:
        What lay before the first step, then each step. The last one ends with the run and is no step like others.
    """
    from kvtrain.cli import main

    with tempfile.TemporaryDirectory() as run, CallCounter(package) as counter:
        limits = ["--trainer.default_root_dir", run, "--trainer.max_steps", str(steps)]
        code = main(["fit", "--config", recipe, *limits, *OPTIONS, *options])
    if code != 0 or len(counter.stretches) != steps + 1:
        raise RuntimeError(f"kvtrain fit ended with {code} and began {len(counter.stretches) - 1} of {steps} steps")
    return counter.stretches


def table(title: str, stretches: Sequence[Stretch], package: Path, most: int) -> str:
    """Mean figures of some stretches, and the functions that are called most in them."""
    number = len(stretches)
    counts = sum((stretch.by_function(package) for stretch in stretches), Counter())
    calls, moves = (sum(each) / number for each in zip(*((s.calls, s.moves) for s in stretches), strict=True))
    lines = [f"{times / number:9,.1f}  {file}: {name}" for (file, name), times in counts.most_common(most)]
    return "\n".join([f"{title}: {calls:,.0f} calls, {moves:,.0f} moves", *lines])


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / RECIPE), help=f"recipe ({RECIPE})")
    parser.add_argument("--package", type=Path, default=ROOT / "kvtrain", help="folder of the package to measure")
    parser.add_argument("--most", type=int, default=25, help="lines of each table (25)")
    parser.add_argument("options", nargs="*", help="more of kvtrain fit, after --")
    return parser.parse_args()


def main() -> None:
    asked = parse_arguments()
    package = asked.package.resolve()
    sys.path.insert(0, str(package.parent))
    stretches = count_fit(package, asked.config, LAST_STEP + 1, asked.options)
    print(table("before the first step", stretches[:1], package, asked.most))
    print(table(f"a step (mean of {FIRST_STEP} to {LAST_STEP})", stretches[FIRST_STEP:-1], package, asked.most))


if __name__ == "__main__":
    main()
