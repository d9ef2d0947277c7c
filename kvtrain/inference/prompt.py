"""Token ids of a prompt."""

from transformers import PreTrainedTokenizerFast

from kvtrain.errors import UsageError


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text to go on from: its own, behind the start token where the tokenizer has one.

    Any number of threads may ask at a time: the tokenizer's settings are left alone.

    Raises:
        ValueError: There are none.
    """
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise UsageError("the prompt is empty and the tokenizer has no start token; give a prompt")
    return ids
