"""The language of the house: words that gave way to those of the trade do not come back in names (prose is free)."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kvtrain"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")])
RECIPES = sorted([*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "configs").rglob("*.yaml")])

_AMERICAN = "American spelling in names"

# Parts of names that are gone, and what stands in their place.
RETIRED = {
    "aside": "say what is kept: pending, evicted",
    "consult": "teacher_inputs",
    "forgetful": "memory_estimate says what it drops",
    "ledger": "outputs",
    "mistakes": "errors",
    "opening": "run_summary",
    "organs": "replace_modules",
    "quiet": "logging_setup",
    "rehearsal": "memory_estimate",
    "rehearse": "measure_step_memory",
    "skeleton": "build_meta_model",
    "told": "kwargs",
    "twin": "detached_copy",
    **dict.fromkeys(("binarise", "colour", "initialisation", "initialise", "normalise", "optimiser"), _AMERICAN),
    **dict.fromkeys(("quantisation", "quantise", "quantised", "regularisation"), _AMERICAN),
}

# Whole names that are gone; their words are ordinary ones and stay free elsewhere.
RETIRED_NAMES = {
    "Diagonal": "strict, bias_after",
    "NewTokens": "ForwardContext",
    "SharingStack": "LayerSchedule",
    "Visibility": "AttentionMask",
    "dmc_step": "step",
    "duo_step": "step",
    "key_documents": "Documents",
    "query_documents": "Documents",
    "visibility": "attention_mask",
    "EVERYTHING": "the pattern `full`",
    "Made": "outputs",
    "Place": "PhaseStep, SettingLocation",
    "Reader": "CacheView",
    "Scope": "pattern",
    "everything": "the pattern `full`",
    "far": "remote",
    "made": "outputs",
    "near": "local",
    "reading": "cache_view",
    "scope_of": "pattern",
    "training_place": "loader_shard",
    "validation_place": "loader_shard",
    "write_place": "write_corpus_and_host",
}


def parts(name: str) -> set[str]:
    """``attend_KVMap2`` as attend, kv, map, 2."""
    return {part.lower() for part in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+", name)}


def identifiers(source: str) -> Iterator[str]:
    """Names that a file gives: functions, classes, arguments, attributes, variables, imports under another name."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield name


def options(source: str) -> Iterator[str]:
    """Options of commands, as ``add_argument`` declares them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            yield from (str(word.value) for word in node.args if isinstance(word, ast.Constant))


def keys(settings: Any) -> Iterator[str]:
    """Names of settings, at any depth."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield str(key)
            yield from keys(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from keys(value)


@functools.cache
def all_names() -> list[tuple[str, str]]:
    """Every name that counts, with the file where it stands."""
    names = []
    for path in [*SOURCES, *RECIPES]:
        where, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
        found = [*identifiers(text), *options(text)] if path.suffix == ".py" else keys(yaml.safe_load(text))
        names += [(name, str(where)) for name in [*where.with_suffix("").parts, *found]]
    return names


def retired(name: str) -> set[str]:
    """Which retired words a name holds, or the name itself where it is one that is gone whole."""
    return (parts(name) & RETIRED.keys()) | ({name.lstrip("_")} & RETIRED_NAMES.keys())


def test_retired_words_do_not_come_back():
    found = [(word, name, where) for name, where in all_names() for word in retired(name)]
    remedy = {**RETIRED, **RETIRED_NAMES}
    assert [f"{where}: {name} ({remedy[word]})" for word, name, where in found] == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gate_ledger", {"ledger"}),
        ("_Forgetful", {"forgetful"}),
        ("HTTPRehearsal", {"rehearsal"}),
        ("INITIALISATION", {"initialisation"}),
        ("--push-to-twin", {"twin"}),
        ("Place", {"Place"}),
        ("_Place", {"Place"}),
        ("placement", set()),
        ("replace_nearest", set()),
        ("retold", set()),
        ("Made", {"Made"}),
        ("made_up", set()),
    ],
)
def test_a_retired_word_is_found(name, found):
    assert retired(name) == found


def test_every_kind_of_name_is_read():
    source = "import a as b\nclass C:\n    d: int = 0\n    def e(self, f, *g, h=1, **i):\n        self.j, k = f\n"
    more = "for l in m:\n    (n := l)\ntry:\n    pass\nexcept X as o:\n    p = [q for q in r]\n"
    assert set(identifiers(source + more)) == {*"bCdefghijklnopq", "self"}
    assert list(options('parser.add_argument("-x", "--some-word", help="no name")')) == ["-x", "--some-word"]
    assert list(keys({"a": [{"b": 1}], "c": {"d": "e"}})) == ["a", "b", "c", "d"]
    names = {name for name, _ in all_names()}
    assert {"PagedStore", "language_model", "--max-new-tokens", "sequence_length", "kvtrain_cli"} <= names
