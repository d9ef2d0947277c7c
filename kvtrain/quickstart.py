"""``make quickstart``: the whole road on two cores, on what the package carries.

The packaged base model is trained on twice with the same tokens, once as it is (the control) and once with
DMC in it; both are exported, opened again, measured through the cache that serves them, and compared.
"""

import sys
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvtrain import cli
from kvtrain.recipes import recipes_folder

BASE = "kvtrain:tiny"
_PLAIN_WIDTH = 110  # where there is no terminal to ask
PROMPT = 'def read_lines(path):\n    """Return the lines of a text file'


def main(folder: Path = Path("runs"), overrides: tuple[str, ...] = ()) -> int:
    """Run the road and print the table.

    Args:
        folder: Where a new folder ``quickstart`` (``quickstart-2``, ...) goes.
        overrides: Options for both trainings, such as ``("--trainer.max_steps", "20")``.

    Returns:
        0, or the exit code of the step that failed.
    """
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    place = _new_place(folder)
    for number, (name, recipe) in enumerate((("control", "dmc_control.yaml"), ("dmc", "dmc.yaml")), 1):
        console.rule(f"{number}/3  training: {name}")
        run, exported = place / name, place / f"{name}-exported"
        recipe_path = recipes_folder() / "tiny" / recipe
        steps = (
            ["fit", "--config", str(recipe_path), "--trainer.default_root_dir", str(run), *overrides],
            ["export", str(run), str(exported)],
        )
        for arguments in steps:
            if code := cli.main(arguments):
                return code
    console.rule("3/3  measuring on held-out text, through the serving cache")
    _measure(console, place)
    return 0


def _new_place(folder: Path) -> Path:
    """A folder that does not exist yet, so that no earlier run is touched."""
    names = (folder / ("quickstart" if number == 1 else f"quickstart-{number}") for number in count(1))
    return next(path for path in names if not path.exists())


def _measure(console: Console, place: Path) -> None:
    from kvtrain.evaluation.evaluate import run_tasks
    from kvtrain.evaluation.report import report_run
    from kvtrain.inference.generate import generate_text

    models = {
        "base, untouched": BASE,
        "control: trained on, method off": str(place / "control-exported"),
        "DMC: trained on, same tokens": str(place / "dmc-exported"),
    }
    rows = {name: run_tasks(model, ["perplexity"])[0] for name, model in models.items()}
    console.print(comparison(rows))
    base, control, dmc = rows.values()
    console.print(
        f"DMC keeps 1 of {dmc['compression']:.2f} tokens, in "
        f"{control['kv_bytes_per_1024'] / dmc['kv_bytes_per_1024']:.2f}x fewer bytes, at "
        f"{dmc['perplexity'] / control['perplexity']:.3f}x the control's perplexity and "
        f"{dmc['perplexity'] / base['perplexity']:.3f}x the base's."
    )
    console.print("\npictures")
    for path in report_run(place / "dmc"):
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    generation = generate_text(str(place / "dmc-exported"), PROMPT, max_new_tokens=96)
    console.rule("generated with the compressing cache")
    console.print(PROMPT + generation.text, markup=False, highlight=False)
    console.print(f"\n{generation.facts()}", markup=False, highlight=False)


def comparison(rows: dict[str, dict[str, Any]]) -> Table:
    """The table of base, control and DMC.

    Args:
        rows: Figures of ``run_tasks`` by the name to show.
    """
    table = Table()
    table.add_column("model")
    for title in ("held-out perplexity", "compression", "KV bytes / 1,024 tokens"):
        table.add_column(title, justify="right")
    for name, row in rows.items():
        allocated = f"{row['kv_bytes_per_1024']:,.0f}"
        table.add_row(name, f"{row['perplexity']:.2f}", f"{row['compression']:.2f}x", allocated)
    return table


if __name__ == "__main__":
    sys.exit(main())
