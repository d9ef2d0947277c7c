"""``make quickstart``: the whole road on two plain cores, on what the package carries.

The packaged base model is retrofitted with DMC, exported, opened again, and measured through the cache that serves
it, beside the base. The retrofit learns from the base's own distribution, so the same training without DMC has
nothing to learn; ``--control`` runs it all the same, and ``benchmarks/dmc_quality.py`` compares the two over seeds.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from kvtrain import cli
from kvtrain.recipes import read_recipe_file, recipes_folder, shown

BASE = "kvtrain:tiny"
PROMPT = 'def read_lines(path):\n    """Return the lines of a text file'
# Names of the table's rows, by the run that they come from.
_BASE, _CONTROL, _DMC = "base, untouched", "control: trained on, DMC left out", "DMC"
_DMC_SETTINGS = ("method", "noisy_finetune")  # of a recipe, which a training without DMC does not have
_PLAIN_WIDTH = 110  # where there is no terminal to ask


def main(
    folder: Path = Path("runs"), overrides: tuple[str, ...] = (), *, control: bool = False, limit: int | None = None
) -> int:
    """Run the road and print the table.

    Args:
        folder: Where a new folder ``quickstart`` (``quickstart-2``, ...) goes.
        overrides: Options for the trainings, such as ``("--trainer.max_steps", "20")``.
        control: Also train the base with DMC left out, on the same tokens, and show what it comes to.
        limit: Held-out windows to measure on; None takes all.

    Returns:
        0, or the exit code of the step that failed.
    """
    began = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    place = _new_place(folder)
    recipes = {"dmc": recipes_folder() / "tiny" / "quickstart.yaml"}
    if control:
        recipes["control"] = _write_control(recipes["dmc"], place / "control.yaml")
    parts = len(recipes) + 1
    with _without_loading_bars():
        for number, (name, recipe) in enumerate(recipes.items(), 1):
            console.rule(f"{number}/{parts}  training: {name}")
            if code := _train(console, recipe, place / name, overrides):
                return code
        console.rule(f"{parts}/{parts}  measuring on held-out text, through the serving cache")
        _measure(console, place, control, limit)
    console.rule("next: your model, your text")
    console.print(next_commands(), markup=False, highlight=False, soft_wrap=True)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    console.print(f"\nAll this took {minutes} min {seconds} s.", highlight=False)
    return 0


def _new_place(folder: Path) -> Path:
    """A folder that does not exist yet, so that no earlier run is touched."""
    names = (folder / ("quickstart" if number == 1 else f"quickstart-{number}") for number in count(1))
    return next(path for path in names if not path.exists())


@contextmanager
def _without_loading_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every model that is opened."""
    from transformers.utils import logging

    shown_before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            logging.enable_progress_bar()


def _write_control(recipe: Path, path: Path) -> Path:
    """The recipe with DMC left out, as a file."""
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(control_of(read_recipe_file(str(recipe))), sort_keys=False), encoding="utf-8")
    return path


def control_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of DMC with the method left out and everything else as it is.

    Args:
        recipe: As its YAML says.
    """
    kept = {name: value for name, value in recipe["model"]["init_args"].items() if name not in _DMC_SETTINGS}
    return {**recipe, "model": {"class_path": "kvtrain.training.RetrofitModule", "init_args": kept}}


def _train(console: Console, recipe: Path, run: Path, overrides: tuple[str, ...]) -> int:
    """Fit and export one model, by the commands that a user would type; the exit code of what failed, or 0."""
    commands = (
        ["fit", "--config", shown(recipe), "--trainer.default_root_dir", str(run), *overrides],
        ["export", str(run), f"{run}-exported"],
    )
    for arguments in commands:
        console.print(f"$ kvtrain {shlex.join(arguments)}", style="dim", highlight=False, markup=False, soft_wrap=True)
        if code := cli.main(arguments):
            return code
    return 0


def _measure(console: Console, place: Path, control: bool, limit: int | None) -> None:
    """Table, pictures and a generated text of what was trained."""
    from kvtrain.evaluation.evaluate import run_tasks
    from kvtrain.evaluation.report import EVALUATION, report_run
    from kvtrain.inference.generate import generate_text

    run, exported = place / "dmc", str(place / "dmc-exported")
    models = {_BASE: BASE, **({_CONTROL: str(place / "control-exported")} if control else {}), _DMC: exported}
    rows = {name: run_tasks(model, ["perplexity"], limit=limit)[0] for name, model in models.items()}
    (run / EVALUATION).write_text(json.dumps([rows[_DMC]], indent=1) + "\n", encoding="utf-8")
    console.print(comparison(rows))
    console.print(verdict(rows), highlight=False)
    *_, page = report_run(run)
    console.print(f"\nThe run in pictures: {shown(page)}", highlight=False, soft_wrap=True)
    generation = generate_text(exported, PROMPT, max_new_tokens=96)
    console.rule("generated with the compressing cache")
    console.print(PROMPT + generation.text, markup=False, highlight=False)
    console.print(f"\n{generation.facts()}", markup=False, highlight=False)


def comparison(rows: dict[str, dict[str, Any]]) -> Table:
    """The table of what was measured.

    Args:
        rows: Figures of ``run_tasks`` by the name to show.
    """
    table = Table()
    table.add_column("model")
    for title in ("held-out perplexity", "compression", "KV bytes / 1,024 tokens"):
        table.add_column(title, justify="right")
    for name, row in rows.items():
        allocated = f"{row['kv_bytes_per_1024']:,.0f}" if row["kv_bytes_per_1024"] else ""  # no window was full
        table.add_row(name, f"{row['perplexity']:.2f}", f"{row['compression']:.2f}x", allocated)
    return table


def verdict(rows: dict[str, dict[str, Any]]) -> str:
    """What DMC saves and what that costs, in a sentence.

    Args:
        rows: As for ``comparison``; the first is the base, the last DMC.
    """
    base, *others, dmc = rows.values()
    full, small = base["kv_bytes_per_1024"], dmc["kv_bytes_per_1024"]
    saved = f", in {full / small:.2f}x fewer bytes" if full and small else ""
    costs = [f"{dmc['perplexity'] / other['perplexity']:.3f}x" for other in (base, *others)]
    judged = " and ".join(f"{cost} the {name}" for cost, name in zip(costs, ("base's", "control's"), strict=False))
    return f"DMC keeps 1 of {dmc['compression']:.2f} tokens{saved}, at {judged} perplexity."


def next_commands(model: str = "MODEL", text: str = "TEXT.jsonl", heldout: str = "HELDOUT.jsonl") -> str:
    """The same road for another model and other text, to be pasted into a shell.

    Args:
        model: Folder or Hub id.
        text: To train on: a line ``{"text": ...}`` a document.
        heldout: To measure on, likewise.
    """
    kvtrain, model, text, heldout = (shlex.quote(word) for word in (_kvtrain(), model, text, heldout))
    lines = (
        f"{kvtrain} fit --config {shown(recipes_folder() / 'tiny' / 'dmc.yaml')} \\",
        "  --trainer.default_root_dir runs/mine --trainer.accelerator auto \\",
        f"  --model.init_args.base {model} --data.tokenizer {model} \\",
        f"  --data.corpus {text} --data.validation_corpus {heldout}",
        f"{kvtrain} export runs/mine exported/mine",
        f"{kvtrain} eval exported/mine --tasks perplexity --corpus {heldout}",
    )
    return "\n".join(lines)


def _kvtrain() -> str:
    """The command as one would type it here: the environment may not be activated."""
    if shutil.which("kvtrain"):
        return "kvtrain"
    beside, here = Path(sys.executable).with_name("kvtrain"), Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)


def _command_line() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvtrain.quickstart", description="Run the whole road once.")
    parser.add_argument("--control", action="store_true", help="also train the base with DMC left out")
    return main(control=parser.parse_args().control)


if __name__ == "__main__":
    sys.exit(_command_line())
