"""Where a model comes from: its base and that one's licence, text and steps of its run, and what was measured."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers.utils.hub import cached_file

from kvtrain.assets import PREFIX, resolve
from kvtrain.metrics import read_metrics
from kvtrain.run_folder import read_config

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_CORPUS = "hf:"
_SHOWN = {  # columns of metrics.csv that say what came out, and how a card calls them
    "val_perplexity": "held-out perplexity",
    "val_loss": "held-out loss",
    "val_compression": "held-out compression",
    "val_accuracy": "held-out accuracy",
}


@dataclass(frozen=True)
class Provenance:
    """What a run folder tells of its model; empty where there is no run.

    Attributes:
        base: What was retrofitted, without folders of the machine that trained.
        hub_base: The same, if it is a Hub id.
        license: Of the base, as its own card says; None where it does not.
        corpus: Text that was trained on, likewise without folders.
        dataset: The same, if it is one of the Hub's.
        sequence_length: Tokens of a row; None where rows have no such length.
        phases: Names, steps and learning rates.
        figures: The last ones that were measured on held-out text, by what they are called.
        step: At which that was.
    """

    base: str | None = None
    hub_base: str | None = None
    license: str | None = None
    corpus: str | None = None
    dataset: str | None = None
    sequence_length: int | None = None
    phases: list[Mapping[str, Any]] = field(default_factory=list)
    figures: Mapping[str, float] = field(default_factory=dict)
    step: int | None = None


def read_provenance(run: Path) -> Provenance:
    """What a run folder tells.

    Args:
        run: Run folder; may lack anything.
    """
    recipe = read_config(run)
    model, data = _arguments(recipe.get("model")), _arguments(recipe.get("data"))
    base, corpus = _text(model.get("base")), _text(data.get("corpus"))
    length, phases = data.get("sequence_length"), model.get("phases")
    step, figures = _last_figures(run)
    return replace(
        base_provenance(base) if base else Provenance(),
        corpus=_without_folders(corpus),
        dataset=corpus.removeprefix(_HUB_CORPUS).split(":")[0] if corpus and corpus.startswith(_HUB_CORPUS) else None,
        sequence_length=length if isinstance(length, int) else None,
        phases=[phase for phase in phases if isinstance(phase, dict)] if isinstance(phases, list) else [],
        figures=figures,
        step=step,
    )


def base_provenance(base: str) -> Provenance:
    """What a base's name and card tell, of a model that is the base but for its method.

    Args:
        base: Folder, Hub id, or ``kvtrain:tiny``.
    """
    hub_base = base if _is_hub_id(base) else None
    return Provenance(_without_folders(base), hub_base, base_license(base))


def base_license(base: str) -> str | None:
    """The licence that a model's own card names; None where there is no card, or it names none.

    Args:
        base: Folder, Hub id, or ``kvtrain:tiny``.
    """
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # a card that cannot be had or read says nothing
        card = cached_file(resolve(base), "README.md")
        text = "" if card is None else Path(card).read_text(encoding="utf-8")
        if text.lstrip().startswith("---"):  # the Hub's reader warns of cards that tell it nothing
            named = getattr(ModelCard(text).data, "license", None)
            return named if isinstance(named, str) else None
    return None


def _arguments(section: Any) -> Mapping[str, Any]:
    """Of a class in a recipe, in its long form and in its short one."""
    section = section if isinstance(section, dict) else {}
    inner = section.get("init_args")
    return inner if isinstance(inner, dict) else section


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _is_hub_id(base: str) -> bool:
    return bool(_HUB_ID.fullmatch(base)) and not Path(base).exists()


def _without_folders(name: str | None) -> str | None:
    """A name as a card may show it: of a path its last part."""
    if name is None or name.startswith((PREFIX, _HUB_CORPUS)) or _is_hub_id(name):
        return name
    return Path(name).name


def _last_figures(run: Path) -> tuple[int | None, dict[str, float]]:
    with contextlib.suppress(ValueError, OSError):
        measured = [row for row in read_metrics(run) if any(name in row for name in _SHOWN)]
        if measured:
            last = measured[-1]
            return int(last["step"]) + 1, {_SHOWN[name]: last[name] for name in _SHOWN if name in last}
    return None, {}
