"""Families of hosts in one file each, planted for as long as a test runs."""

import contextlib
import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from kvtrain.models import hosts
from kvtrain.models.hosts import host_adapters
from tests import hosts as tiny_hosts

SOURCES = {"planted": "planted_host.py", "uneven": "planted_uneven_host.py"}


@contextlib.contextmanager
def planting(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Put a file on the path of ``kvtrain.models.hosts``, and its classes into transformers' ``Auto*`` classes."""
    folder.mkdir()
    shutil.copy(Path(__file__).parent / SOURCES[family], folder / f"{family}.py")
    monkeypatch.setattr(hosts, "__path__", [*hosts.__path__, str(folder)])
    importlib.invalidate_caches()
    host_adapters.cache_clear()
    host_adapters()
    module = sys.modules[f"kvtrain.models.hosts.{family}"]
    config, model = module.FAMILY
    AutoConfig.register(family, config)
    AutoModelForCausalLM.register(config, model)
    monkeypatch.setitem(tiny_hosts.FAMILIES, family, config)
    try:
        yield module
    finally:
        host_adapters.cache_clear()
        sys.modules.pop(f"kvtrain.models.hosts.{family}")
        CONFIG_MAPPING._extra_content.pop(family)
        AutoModelForCausalLM._model_mapping._extra_content.pop(config)
