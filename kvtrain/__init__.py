"""kvtrain: language models whose key-value cache is small by construction.

    model = kvtrain.retrofit(hf_model, kvtrain.DMC(compression=4))
    model = kvtrain.load("path-or-hub-id")

Importing this package registers its models with ``AutoConfig`` and the ``AutoModelFor*`` classes; everything
heavy is loaded at first use. Methods (``kvtrain.DMC``) and models without a host (``kvtrain.TransNormerForCausalLM``)
are found in ``kvtrain.models``; where a type checker must know them, import them from there.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kvtrain.models.auto import register
from kvtrain.models.compat import say_if_untested
from kvtrain.models.registry import architectures, public_names

if TYPE_CHECKING:
    from kvtrain.inference.load import load
    from kvtrain.models.gqa import convert_gqa
    from kvtrain.models.host import retrofit
    from kvtrain.models.hybrid.convert import convert_linear

__version__ = "0.1.0"
_FUNCTIONS = {
    "convert_gqa": "kvtrain.models.gqa",
    "convert_linear": "kvtrain.models.hybrid.convert",
    "load": "kvtrain.inference.load",
    "retrofit": "kvtrain.models.host",
}
__all__ = ["__version__", "convert_gqa", "convert_linear", "load", "retrofit", *public_names(architectures())]  # noqa: PLE0604

register()
say_if_untested()


def __getattr__(name: str) -> Any:
    module = _FUNCTIONS.get(name) or public_names(architectures()).get(name)
    if module is None:
        raise AttributeError(f"module 'kvtrain' has no attribute {name!r}")
    return globals().setdefault(name, getattr(importlib.import_module(module), name))  # found without us from now on
