"""``kvtrain report RUN``: the pictures of a run, and one page that holds them all."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kvtrain.evaluation import plots
from kvtrain.evaluation.page import facts_table, write_page
from kvtrain.evaluation.plots import Bucket
from kvtrain.metrics import METRICS, Rows, Table, read_metrics
from kvtrain.models import registry
from kvtrain.plotting.curves import Curve
from kvtrain.run_folder import read_config

FOLDER = "report"
EVALUATION = "eval.json"
PAGE = "report.html"


def report_run(run: Path, output: Path | None = None, control: Path | None = None) -> list[Path]:
    """Draw a run's tables and its evaluation, and write ``report.html``, one page that needs no other file.

    Args:
        run: Run folder of ``kvtrain fit``, finished or not; ``eval.json`` of ``kvtrain eval --json`` may lie in it.
        output: Where the files go; ``RUN/report`` where absent.
        control: Run folder of what the run is judged by: the same training without the method.

    Returns:
        The files written: one PNG a figure, then the page.

    Raises:
        ValueError: A run has no metrics, or one of the files is damaged.
    """
    tables = load_tables(run)
    beside = load_tables(control)[METRICS] if control else []
    drawn = figures(tables, load_positions(run), distilled=learns_from_a_teacher(run), control=beside)
    before = facts_table(facts(tables[METRICS], beside))
    return write_page(output or run / FOLDER, PAGE, run.resolve().name, drawn, before=before)


def load_tables(run: Path) -> dict[Table, Rows]:
    """The tables of a run that can be drawn: its metrics, and those that any architecture's training writes.

    Args:
        run: Run folder, of this version or an older one.

    Raises:
        ValueError: The metrics hold no losses, or a table is damaged; one line that names the place.
    """
    rows = read_metrics(run)
    if not any("loss" in row or "val_loss" in row for row in rows):
        path = run / METRICS.name
        raise ValueError(f"{path}: no losses yet; the first ones come after trainer.log_every_n_steps steps")
    others = dict.fromkeys(figure.table for figure in registry.figures().drawn if figure.table != METRICS)
    return {METRICS: rows, **{table: table.read(run) for table in others}}


def load_positions(run: Path) -> list[Bucket]:
    """Losses by position of a run's ``eval.json``; none where there is no such file, or it says nothing of them.

    Args:
        run: Run folder.

    Raises:
        ValueError: The file is damaged.
    """
    path = run / EVALUATION
    if not path.is_file():
        return []
    try:
        tasks: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        entries = [entry for task in tasks for entry in task.get("by_position", [])]
        return [_bucket(entry) for entry in entries]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not what kvtrain eval --json writes ({error})") from error


def _bucket(entry: dict[str, Any]) -> Bucket:
    kept = entry["kept"]
    return Bucket(int(entry["position"]), float(entry["loss"]), None if kept is None else float(kept))


def learns_from_a_teacher(run: Path) -> bool:
    """Whether a run's training loss is measured against its base, as its ``config.yaml`` says; no without one.

    Args:
        run: Run folder.
    """
    model = read_config(run).get("model") or {}
    return bool((model.get("init_args") or {}).get("distill"))


def figures(
    tables: Mapping[Table, Rows], positions: Sequence[Bucket] = (), *, distilled: bool = False, control: Rows = ()
) -> dict[str, Figure]:
    """Every figure that these numbers allow, by the name of its file.

    Args:
        tables: From ``load_tables``; ``METRICS`` is among them.
        positions: From ``eval.json``.
        distilled: Whether the training loss is measured against a teacher.
        control: Metrics of another run, beside whose held-out loss this one's is drawn.
    """
    rows = tables[METRICS]
    drawn = {
        "loss": plots.loss_figure(rows, distilled, control),
        **{one.name: one.draw(tables[one.table]) for one in registry.figures().drawn if tables.get(one.table)},
        "perplexity_by_position": plots.perplexity_figure(positions),
        "slots_by_position": plots.slots_figure(positions),
        "learning_rate": plots.learning_rate_figure(rows),
        "speed": plots.speed_figure(rows),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def facts(rows: Rows, control: Rows = ()) -> dict[str, str]:
    """The run in a few numbers; what was not logged is left out.

    Args:
        rows: Rows of ``metrics.csv``.
        control: Those of another run, which the last held-out loss is compared with.
    """
    loss, speed = Curve.of(rows, "loss").smoothed(), Curve.of(rows, "tokens_per_second")
    found = {
        "Optimizer steps": f"{int(rows[-1]['step']) + 1:,}",
        "Tokens": _last(rows, "tokens", ",.0f"),
        "Tokens per second, median": f"{statistics.median(speed.values):,.0f}" if speed else None,
        "Training loss at the end, smoothed": f"{loss.last:.4f}" if loss else None,
        "Held-out loss at the end": _last(rows, "val_loss", ".4f"),
        "Held-out perplexity at the end": _last(rows, "val_perplexity", ".2f"),
        "Held-out perplexity of the control": _last(control, "val_perplexity", ".2f"),
        **{fact.label: _last(rows, fact.column, fact.form) for fact in registry.figures().facts},
    }
    return {name: value for name, value in found.items() if value is not None}


def _last(rows: Rows, column: str, form: str) -> str | None:
    """The latest value of a column, written out; None where it was never logged."""
    curve = Curve.of(rows, column)
    return format(curve.last, form) if curve else None
