"""Open a model for use."""

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from kvtrain.assets import resolve


def load(name: str, **kwargs: Any) -> PreTrainedModel:
    """Load a model that kvtrain exported, or a plain one that it can retrofit, ready for inference.

    Args:
        name: Folder, Hub id, or ``kvtrain:tiny``.
        **kwargs: Go to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map`` ...).

    Raises:
        ValueError: There is no model there.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(resolve(name), **kwargs)  # type: ignore[no-any-return]
    except OSError as error:
        reason = (str(error).splitlines() or ["unknown reason"])[0]
        raise ValueError(f"no model at {name!r} ({reason})") from error
