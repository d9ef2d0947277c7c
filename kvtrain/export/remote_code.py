"""The code that a model needs, written beside its weights: ``trust_remote_code=True`` then opens it without kvtrain."""

import ast
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from kvtrain.export.flatten import Substitute, flat_name, flatten
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.hosts import host_adapter, retrofitted_names
from kvtrain.models.portable import SHIM, PortableConfig
from kvtrain.models.registry import method_architecture, own_models

_HOST, _STAND_IN, _COMPAT = "kvtrain.models.host", "kvtrain.models.stand_in", "kvtrain.models.compat"
# These scan the package for what lies there; of what travels in a folder there is one of each kind.
_SCANNING = ("kvtrain.models.registry", "kvtrain.models.discovery")
_REGISTRY = "kvtrain_registry"


def write_remote_code(folder: Path, config: PreTrainedConfig) -> list[Path]:
    """Write what opens a folder where kvtrain is not installed, and name it in ``config.json``.

    Args:
        folder: Of a saved model.
        config: The model's configuration.

    Returns:
        The files with code; none for a model that transformers knows by itself.

    Raises:
        ValueError: The method's code cannot travel; nothing is written then, and the message says why.
    """
    code = remote_code(config)
    if code and isinstance(config, PortableConfig):
        path = folder / CONFIG_NAME
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.get("auto_map") != config.auto_classes:
            saved["auto_map"] = config.auto_classes
            path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_files(code, folder)
    return [folder / name for name in code]


def write_files(texts: Mapping[str, str], folder: Path) -> None:
    """Write what ``remote_code`` returns into a folder whose ``config.json`` has its ``auto_map``."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def remote_code(config: PreTrainedConfig) -> dict[str, str]:
    """Texts of all files with a model's code, by their names; the same for the same kvtrain and configuration.

    Args:
        config: The model's; without kvtrain's own part there is no code.

    Raises:
        ValueError: The method's code cannot travel; the message says why.
    """
    if isinstance(config, KVTrainConfig):
        return _retrofitted(config)
    for own in own_models():
        if isinstance(config, PortableConfig) and isinstance(config, own.config):
            return _bundle(config, own.module, {})
    return {}


def _retrofitted(config: KVTrainConfig) -> dict[str, str]:
    settings, adapter = config.method, host_adapter(config.host_config)
    builder, model = method_architecture(settings).module, retrofitted_names()[config.host_config.model_type]
    registry = _METHOD_REGISTRY.format(
        method=settings.name,
        settings=flat_name(type(settings).__module__),
        settings_class=type(settings).__name__,
        builder=flat_name(builder),
        adapter=flat_name(type(adapter).__module__),
    )
    starts = (type(settings).__module__, builder, type(adapter).__module__)
    return _bundle(config, _HOST, {"KVTrainForCausalLM": model}, registry, starts)


def _bundle(
    config: PortableConfig, models: str, classes: Mapping[str, str], registry: str = "", starts: Iterable[str] = ()
) -> dict[str, str]:
    """All files.

    Args:
        config: The model's.
        models: The module that has its classes.
        classes: Names of classes there that ``auto_map`` has under others.
        registry: Text of the file that names what the folder has; empty where nothing may ask for it.
        starts: Modules that it names.
    """
    names = frozenset(node.name for node in ast.parse(registry).body if isinstance(node, ast.FunctionDef))
    replaced = dict.fromkeys(_SCANNING, Substitute(_REGISTRY, names)) if registry else {}
    try:
        modules = flatten({models, type(config).__module__, _STAND_IN, _COMPAT, *starts}, replaced)
    except ValueError as error:
        raise ValueError(f"the code of {config.architecture_name!r} cannot travel: {error}") from error
    texts = {flat_name(name): _header(name) + text for name, text in modules.items()}
    if registry:
        texts[_REGISTRY] = _header("kvtrain.export.remote_code") + registry
    entry = _entry(config, flat_name(models), classes, [*texts])
    return {f"{file}.py": text for file, text in sorted({**texts, SHIM.stem: entry}.items())}


def _entry(config: PortableConfig, models: str, classes: Mapping[str, str], files: list[str]) -> str:
    """The file that ``auto_map`` names."""
    heads = {auto: name.partition(".")[2] for auto, name in config.auto_classes.items() if auto != "AutoConfig"}
    ours = type(config).__name__
    return _header("kvtrain.export.remote_code") + _ENTRY.format(
        autos=", ".join(heads),
        models=models,
        compat=flat_name(_COMPAT),
        settings=flat_name(type(config).__module__),
        config=ours,
        stand_in=flat_name(_STAND_IN),
        heads="\n".join(
            _HEAD.format(name=name, config=ours, auto=auto, model=classes.get(name, name))
            for auto, name in heads.items()
        ),
        files="\n".join(f"    from .{file} import *" for file in sorted(files)),
    )


def _header(origin: str) -> str:
    """Where a file comes from, and under which licence."""
    kvtrain = importlib.metadata.metadata("kvtrain")
    return (
        f"# From kvtrain {kvtrain['Version']}, {origin}; written by `kvtrain export --remote-code`.\n"
        f"# Copyright {kvtrain['Author']}. SPDX-License-Identifier: {kvtrain['License-Expression']}\n"
    )


_ENTRY = '''"""Opens this folder with ``trust_remote_code=True``: by an installed kvtrain, else by the files beside."""

from typing import TYPE_CHECKING

try:
    from kvtrain.models.auto import class_by_name
except ModuleNotFoundError as error:
    if error.name not in ("kvtrain", "kvtrain.models"):
        raise
    class_by_name = None

if class_by_name is not None:
    __getattr__ = class_by_name  # the classes that `auto_map` in config.json names
else:
    from transformers import {autos}

    from . import {models} as models
    from .{compat} import say_if_untested
    from .{settings} import {config}
    from .{stand_in} import stand_in

{heads}
    say_if_untested()

if TYPE_CHECKING:  # transformers takes along the files that are named in this form, and this names all
{files}
'''

_HEAD = """\
    {name} = stand_in(
        "{name}", {config}, {auto}, lambda _: models.{model}
    )"""

_METHOD_REGISTRY = '''"""What this folder has: one method, and one family of hosts."""


def exported(package, name, folders):
    """The family's adapter, which is all that is looked for by scanning."""
    from .{adapter} import ADAPTER

    return [ADAPTER]


def builder(settings, host_config):
    """What makes modules and caches."""
    from .{builder} import Builder

    return Builder(settings, host_config)


def method_from_dict(settings):
    """The method from what ``config.json`` holds.

    Raises:
        ValueError: It is another method, or has a field that this one does not have.
    """
    from .{settings} import {settings_class}

    if settings.get("name") != "{method}":
        raise ValueError(f"this folder has the code of '{method}', not of {{settings.get('name')!r}}; install kvtrain")
    return {settings_class}.from_dict(settings)
'''
