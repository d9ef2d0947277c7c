"""Modules as flat files: what is followed, how imports are rewritten, and what cannot travel."""

import importlib
import re
import sys

import pytest

import kvtrain
from kvtrain import models
from kvtrain.cli import main
from kvtrain.export.flatten import Substitute, flatten
from kvtrain.models.registry import MethodArchitecture
from tests.export.test_hf import write_run

SAMPLE = '''"""A sample."""

from __future__ import annotations

import math  # the standard library's
from typing import TYPE_CHECKING

import torch
from kvtrain.models import odd
from kvtrain.models.odd.other import (
    other,  # by the name of its module
    second as third,
)
from . import other as sibling

if TYPE_CHECKING:
    import matplotlib
    from kvtrain.models.figures import Figures
    from kvtrain.models.odd.other import Type
else:
    from kvtrain.models.odd.other import fourth

try:
    import flash_attn
except ImportError:
    flash_attn = None


def function():
    """Of a package that may be absent, and of a module that needs one."""
    from liger_kernel.ops import rope  # where it is used

    from kvtrain.models.odd.lazy import lazy

    return "from kvtrain.models import odd", rope, lazy
'''

REWRITTEN = '''"""A sample."""

from __future__ import annotations

import math  # the standard library's
from typing import TYPE_CHECKING

import torch
from . import kvtrain_models_odd as odd
from .kvtrain_models_odd_other import other, second as third
from . import kvtrain_models_odd_other as sibling

if TYPE_CHECKING:
    pass
    pass
    from .kvtrain_models_odd_other import Type
else:
    from .kvtrain_models_odd_other import fourth

try:
    import flash_attn
except ImportError:
    flash_attn = None


def function():
    """Of a package that may be absent, and of a module that needs one."""
    try:
        from liger_kernel.ops import rope
    except ImportError:
        raise  # tried, because transformers refuses files that name absent packages elsewhere

    from .kvtrain_models_odd_lazy import lazy

    return "from kvtrain.models import odd", rope, lazy
'''

LAZY = """import triton
from kvtrain.models.registry import builder
"""


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Put files into ``kvtrain/models/odd/``."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "__init__.py").write_text("")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])

    def write(**files):
        for name, text in files.items():
            (tmp_path / "odd" / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if name.startswith("kvtrain.models.odd")]:
        del sys.modules[name]


REGISTRY = {"kvtrain.models.registry": Substitute("registry", frozenset({"builder"}))}


def test_imports_are_followed_and_rewritten_and_nothing_else_changes(plant):
    plant(sample=SAMPLE, other="other = second = fourth = 1\n", lazy=LAZY)
    files = flatten(["kvtrain.models.odd.sample"], REGISTRY)
    assert [name.removeprefix("kvtrain.models.") for name in files] == ["odd", "odd.lazy", "odd.other", "odd.sample"]
    assert files["kvtrain.models.odd.sample"] == REWRITTEN
    guard = "raise  # tried, because transformers refuses files that name absent packages elsewhere"
    lazy = f"try:\n    import triton\nexcept ImportError:\n    {guard}\nfrom .registry import builder\n"
    assert files["kvtrain.models.odd.lazy"] == lazy
    assert not [name for name in sys.modules if name.startswith("kvtrain.models.odd.")]


REFUSED = {
    "import lightning\n": "kvtrain.models.odd.build needs lightning, which may be absent",
    "from kvtrain.models.odd import helper\n": "kvtrain.models.odd.helper needs lightning",
    "import importlib\nimportlib.import_module('a')\n": "imports what it chooses while it runs (import_module)",
    "import kvtrain.kernels.rope\n": "line 1 imports a module by its whole name",
    "from kvtrain.models.registry import methods\n": "asks kvtrain.models.registry for methods, which no folder has",
    "import math; from kvtrain.kernels import rope\n": "an import shares line 1 with something",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_travel_is_refused_with_the_reason(plant, text):
    plant(build=text, helper="import lightning\n")
    with pytest.raises(ValueError, match=re.escape(REFUSED[text])):
        flatten(["kvtrain.models.odd.build"], REGISTRY)


def test_other_packages_do_not_travel(plant):
    with pytest.raises(ValueError, match=r"somebody\.build is no source file of kvtrain, and nothing else can travel"):
        flatten(["somebody.build"], {})


def test_an_export_whose_method_cannot_travel_is_one_line_and_nothing_is_written(plant, tmp_path, monkeypatch, capsys):
    plant(build="import lightning\n")
    write_run(tmp_path / "run", kvtrain.DMC())
    elsewhere = MethodArchitecture(kvtrain.DMC, "kvtrain.models.odd.build")
    monkeypatch.setattr("kvtrain.export.remote_code.method_architecture", lambda _: elsewhere)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--remote-code"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the code of 'dmc' cannot travel: kvtrain.models.odd.build needs lightning" in line
    assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.py")] == ["modeling_kvtrain.py"]
