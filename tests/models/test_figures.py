"""What reports show of architectures is found in their folders."""

import importlib

import pytest

from kvtrain.metrics import METRICS, Table
from kvtrain.models import registry
from kvtrain.models.discovery import exported_by_files
from kvtrain.models.figures import Fact, Figures, TableFigure


def draw(rows):
    return None


def shown(*names, table=METRICS, facts=()):
    return Figures(tuple(TableFigure(name, table, draw) for name in names), facts)


def test_what_architectures_share_comes_once():
    fact = Fact("Held-out", "val_loss", ".2f")
    both = Figures.union([shown("a", "b", facts=(fact,)), shown("c", "b", facts=(fact,))])
    assert both == shown("a", "b", "c", facts=(fact,))


def test_two_figures_do_not_share_a_file_nor_two_facts_a_label():
    with pytest.raises(AssertionError, match="one file"):
        Figures.union([shown("a"), shown("a", table=Table("other.csv", ("step",)))])
    with pytest.raises(AssertionError, match="one label"):
        Figures.union([shown(facts=(Fact("A", column, ".2f"),)) for column in ("loss", "val_loss")])


def test_a_folder_answers_or_has_no_such_file(tmp_path, monkeypatch):
    for folder, files in {"alpha": {"figures": "FIGURES = 1"}, "beta": {"other": "FIGURES = 2"}}.items():
        (tmp_path / "planted_rooms" / folder).mkdir(parents=True)
        for name, source in {"__init__": "", **files}.items():
            (tmp_path / "planted_rooms" / folder / f"{name}.py").write_text(source)
    (tmp_path / "planted_rooms" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert exported_by_files("planted_rooms", "figures", "FIGURES") == [1]
    (tmp_path / "planted_rooms" / "beta" / "figures.py").write_text("FIGURE = 2")
    importlib.invalidate_caches()
    with pytest.raises(AttributeError, match="FIGURES"):
        exported_by_files("planted_rooms", "figures", "FIGURES")


def test_the_figures_of_our_architectures():
    """Names of files are what users' scripts look for."""
    found = [(figure.name, figure.table.name) for figure in registry.figures().drawn]
    assert found == [
        ("compression", "metrics.csv"),
        ("layer_compression", "head_compression.csv"),
        ("head_compression", "head_compression.csv"),
        ("head_gates", "head_gates.csv"),
        ("kv_map", "kv_map.csv"),
    ]
