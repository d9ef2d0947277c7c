"""Open a model for use."""

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvtrain.assets import resolve
from kvtrain.data.tokenizer import load_tokenizer


def load(name: str, **kwargs: Any) -> PreTrainedModel:
    """Load a model that kvtrain exported, or any other causal language model, ready for inference.

    Args:
        name: Folder, Hub id, or ``kvtrain:tiny``.
        **kwargs: Go to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map`` ...).

    Raises:
        ValueError: There is no model there.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(resolve(name), **kwargs)
    except OSError as error:
        reason = (str(error).splitlines() or ["unknown reason"])[0]
        raise ValueError(f"no model at {name!r} ({reason})") from error


def open_model(name: str, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerFast]:
    """Load a model with its tokenizer; a plain host gets ``Full``, so that its cache can be measured too.

    Args:
        name: Folder, Hub id, or ``kvtrain:tiny``.
        **kwargs: As in ``load``.

    Raises:
        ValueError: There is no model or tokenizer, or the host is of no supported family.
    """
    from kvtrain.models.full import Full
    from kvtrain.models.host import KVTrainMixin, retrofit

    model = load(name, **kwargs)
    if not isinstance(model, KVTrainMixin):
        model = retrofit(model, Full())
    return model.eval(), load_tokenizer(name)
