"""kvtrain: language models whose key-value cache is small by construction.

    model = kvtrain.retrofit(hf_model, kvtrain.DMC(compression=4))
    model = kvtrain.load("path-or-hub-id")

Importing this package registers its models with ``AutoConfig`` and the ``AutoModelFor*`` classes; everything
heavy is loaded at first use.
"""

from typing import TYPE_CHECKING, Any

from kvtrain.models.auto import register
from kvtrain.models.compat import say_if_untested
from kvtrain.models.registry import methods, own_models
from kvtrain.models.transnormer.config import TransNormerConfig

if TYPE_CHECKING:
    from kvtrain.inference.load import load
    from kvtrain.models.dmc import DMC
    from kvtrain.models.full import Full
    from kvtrain.models.gqa import convert_gqa
    from kvtrain.models.host import retrofit
    from kvtrain.models.lckv import LCKV
    from kvtrain.models.transnormer.heads import (
        TransNormerForCausalLM,
        TransNormerForMaskedLM,
        TransNormerForSequenceClassification,
    )

__version__ = "0.1.0"
__all__ = [
    "DMC",
    "LCKV",
    "Full",
    "TransNormerConfig",
    "TransNormerForCausalLM",
    "TransNormerForMaskedLM",
    "TransNormerForSequenceClassification",
    "__version__",
    "convert_gqa",
    "load",
    "retrofit",
]

register()
say_if_untested()


def __getattr__(name: str) -> Any:
    if name == "retrofit":
        from kvtrain.models.host import retrofit

        return retrofit
    if name == "convert_gqa":
        from kvtrain.models.gqa import convert_gqa

        return convert_gqa
    if name == "load":
        from kvtrain.inference.load import load

        return load
    for own in own_models():
        if name.startswith(f"{own.prefix}For"):
            return own.head(name)
    for method in methods().values():
        if method.__name__ == name:
            return method
    raise AttributeError(f"module 'kvtrain' has no attribute {name!r}")
