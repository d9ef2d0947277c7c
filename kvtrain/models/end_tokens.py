"""Tokens that end an answer, as ``generate`` knows them."""

from transformers import GenerationConfig


def end_token_ids(settings: GenerationConfig) -> list[int]:
    """End tokens in their order; none where a model goes on for as long as it is let.

    Args:
        settings: Of the model, as ``model.generation_config``.
    """
    own = settings.eos_token_id
    if own is None:
        return []
    return list(own) if isinstance(own, list) else [own]
