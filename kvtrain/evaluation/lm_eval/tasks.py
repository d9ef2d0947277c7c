"""lm-eval's tasks as rows of ``kvtrain eval``."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvtrain.errors import UsageError, first_line, unknown
from kvtrain.evaluation.lm_eval import refused_by_lm_eval, require_lm_eval

_FILES = (".yaml", ".yml")


class LmEvalTask:
    """A task, a group or a tag of lm-eval's, or a file that describes one, found before any model is read.

    Args:
        name: Its name, or the path of its YAML file.

    Raises:
        ValueError: lm-eval is not installed, or there is none.
    """

    def __init__(self, name: str) -> None:
        require_lm_eval()
        from lm_eval.tasks import TaskManager

        self.name = name
        described = self._read_file(name) if name.endswith(_FILES) else None
        self._spec: str | dict[str, Any] = name
        if described is not None and "group" not in described:
            self._spec, self._manager = described, TaskManager(include_defaults=False)
            return
        folder = None if described is None else Path(name).parent  # a group's tasks may lie there, or be lm-eval's
        self._manager = TaskManager(include_path=folder)
        if described is not None:
            self._spec = str(described["group"])
        if self._spec not in self._manager.all_tasks:
            hint = "`lm-eval ls tasks` lists them; a file's name ends in .yaml"
            raise UsageError(unknown("lm-eval task", name, self._manager.all_tasks, hint))

    def _read_file(self, path: str) -> dict[str, Any]:
        from lm_eval.tasks._yaml_loader import load_yaml

        if not Path(path).is_file():
            raise UsageError(f"lm-eval:{path}: no such file")
        try:
            return dict(load_yaml(path, resolve_func=True))
        except Exception as error:  # YAML's, or of the functions that it names
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UsageError:
        return UsageError(f"lm-eval:{self.name} cannot be read ({first_line(error)})")

    def measure(
        self,
        model: Any,
        tokenizer: Any,
        *,
        limit: int | None,
        decode: bool,
        num_fewshot: int | None,
        chat_template: bool,
    ) -> list[dict[str, Any]]:
        """Run it, and give a row of figures for each task in it, and for each group that lm-eval sums up.

        Args:
            model: From ``open_model``.
            tokenizer: Its tokenizer.
            limit: Documents of each task; None reads all.
            decode: Read windows token by token.
            num_fewshot: Examples before each question; None leaves it to the task.
            chat_template: Apply the tokenizer's chat template.

        Raises:
            ValueError: Its file or its documents cannot be read, or the model cannot do what it asks for.
        """
        from lm_eval import simple_evaluate

        from kvtrain.evaluation.lm_eval.model import ServedLM

        tasks, runner = self._load(), ServedLM(model, tokenizer, decode=decode)
        settings = {"limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": chat_template}
        settings["fewshot_as_multiturn"] = chat_template
        try:
            results = simple_evaluate(runner, tasks=tasks, task_manager=self._manager, log_samples=False, **settings)
        except ValueError as error:
            if not refused_by_lm_eval(error):
                raise
            raise UsageError(f"lm-eval:{self.name}: {first_line(error)}") from error
        assert results is not None  # of one process
        on = {"chat_template": chat_template, "decode": decode}
        return [_row(name, results, runner, on) for name in results["results"]]

    def _load(self) -> list[Any]:
        """Tasks and groups with their documents, without those that are parts of others.

        Raises:
            ValueError: They cannot be read.
        """
        try:
            loaded = self._manager.load([self._spec])
        except Exception as error:  # a task is a program: whatever it raises
            raise self._unreadable(error) from error
        parts = {name for children in loaded["group_map"].values() for name in children}
        found = {**loaded["groups"], **({} if loaded["groups"] else loaded["tasks"])}
        return [item for name, item in found.items() if name not in parts]


def _row(name: str, results: dict[str, Any], runner: Any, on: dict[str, Any]) -> dict[str, Any]:
    """Metrics as ``acc``, or ``exact_match/strict`` of a filter; the first, which charts show; sizes; what was held."""
    found: dict[str, Any] = results["results"][name]
    figures = {
        metric.removesuffix(",none").replace(",", "/"): float(value)
        for metric, value in found.items()
        if isinstance(value, int | float) and "," in metric
    }
    first = next((metric for metric in figures if not metric.partition("/")[0].endswith("_stderr")), None)
    rises = results.get("higher_is_better", {}).get(name, {}).get(str(first).partition("/")[0], True)
    meter = runner.meters.get(name)
    held = None if meter is None else meter.result()
    version = results["versions"].get(name)
    numbered = version if isinstance(version, int | float) else None
    return {
        "task": f"lm-eval:{name}",
        "documents": results["n-samples"].get(name, {}).get("effective"),
        **figures,
        "metric": first,
        "better": "higher" if rises else "lower",
        **({} if held is None else asdict(held)),
        "measured_on": {"num_fewshot": results["n-shot"].get(name), "version": numbered, **on},
    }
