"""Open a model for use."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvtrain.assets import resolve
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.errors import explain_load_errors
from kvtrain.models.registry import own_model_class


def load(name: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model that kvtrain exported, or any other causal language model, ready for inference.

    A TransNormer comes back as what was exported: a causal or masked language model, or a classifier.

    Args:
        name: Folder, Hub id, or ``kvtrain:tiny``.
        **kwargs: Go to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map`` ...).

    Raises:
        ValueError: There is no model there.
    """
    path = resolve(str(name))
    with explain_load_errors(str(name)):
        chosen: Any = own_model_class(AutoConfig.from_pretrained(path)) or AutoModelForCausalLM
        model: PreTrainedModel = chosen.from_pretrained(path, **kwargs)
    return model


def open_model(name: str | Path, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerFast]:
    """Load a model with its tokenizer; a plain host gets ``Full``, so that its cache can be measured too.

    Args:
        name: Folder, Hub id, or ``kvtrain:tiny``.
        **kwargs: As in ``load``.

    Raises:
        ValueError: There is no model or tokenizer, or the host is of no supported family.
    """
    from kvtrain.models.full import Full
    from kvtrain.models.host import retrofit
    from kvtrain.models.language_model import CachedLanguageModel

    model = load(name, **kwargs)
    if own_model_class(model.config) and not isinstance(model, CachedLanguageModel):
        raise ValueError(f"{name} is a {type(model).__name__}, which generates no text; open it with kvtrain.load")
    if not isinstance(model, CachedLanguageModel):
        model = retrofit(model, Full())
    return model.eval(), load_tokenizer(str(name))
