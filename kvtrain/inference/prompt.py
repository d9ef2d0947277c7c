"""Token ids of a prompt or a chat, and whether a model can go on from so many."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from kvtrain.errors import UsageError, first_line


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


def chat_ids(tokenizer: PreTrainedTokenizerFast, turns: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a chat whose next turn is the assistant's, by the tokenizer's chat template.

    Args:
        tokenizer: With a template.
        turns: Each with ``role`` and ``content``.

    Raises:
        ValueError: There is no template, it fails on the chat, or it writes nothing.
    """
    if not tokenizer.chat_template:
        raise UsageError("the tokenizer has no chat template; leave --apply-chat-template out")
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    try:
        ids: list[int] = tokenizer.apply_chat_template(list(turns), **settings)  # type: ignore[assignment, arg-type]
    except Exception as error:  # a template is a program, which may fail in any way
        raise UsageError(f"the chat template fails on this chat ({first_line(error)})") from error
    if not ids:
        raise UsageError("the chat template writes nothing for this chat; leave --apply-chat-template out")
    return ids


def beyond_positions(max_positions: int | None, prompt_tokens: int, max_new_tokens: int) -> str | None:
    """Why a model cannot go on so far from a prompt: it has too few positions; None where it has enough.

    Args:
        max_positions: Of the model; None for no end.
        prompt_tokens: Of the prompt.
        max_new_tokens: Of the answer, whose last token is chosen but not read.
    """
    if max_positions is None or prompt_tokens + max_new_tokens <= max_positions + 1:
        return None
    return (
        f"prompt and max_new_tokens come to {prompt_tokens + max_new_tokens:,} tokens, above the {max_positions + 1:,} "
        f"to which the model's {max_positions:,} positions reach; shorten the prompt or lower max_new_tokens"
    )
