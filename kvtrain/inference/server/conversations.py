"""Token ids of chats: a template makes them text, and what the model has said keeps the tokens that it said it in."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from kvtrain.inference.server.errors import ApiError

_MOST_TEXTS = 1024
_MOST_CHARACTERS = 1 << 22


class Conversations:
    """Chats as token ids.

    A tokenizer may cut an answer otherwise than the model wrote it, and then the kept row of the turn before would be
    of no use. So a chat that goes on from a known text gets that text's own tokens, and only the rest is tokenized.

    Args:
        tokenizer: With a chat template, if chats are to be served.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: OrderedDict[str, list[int]] = OrderedDict()  # the latest last
        self._characters = 0
        self._lock = threading.Lock()

    def text(self, messages: Sequence[dict[str, Any]]) -> str:
        """A chat in the template's form, up to where the answer begins.

        Raises:
            ApiError: There is no template, or it refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise ApiError(
                400,
                "this model has no chat template; use /v1/completions, or start the server with --chat-template FILE",
                "messages",
                "no_chat_template",
            )
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, which may fail in any way
            message = f"messages: the chat template refuses them: {error}"
            raise ApiError(400, message, "messages", "chat_template_error") from error
        if not text:
            raise ApiError(400, "messages: the chat template makes no text of them; say something", "messages")
        return str(text)

    def ids(self, text: str) -> list[int]:
        """Tokens of a chat's text."""
        with self._lock:
            known = max((before for before in self._known if text.startswith(before)), key=len, default="")
            begun = self._known.get(known, [])
            if known:
                self._known.move_to_end(known)
        rest = self._tokenizer.backend_tokenizer.encode(text[len(known) :], add_special_tokens=False).ids
        return [*begun, *rest]

    def remember(self, text: str, ids: Sequence[int]) -> None:
        """Know a chat up to the end of an answer.

        Args:
            text: Of the chat and its answer.
            ids: Their tokens, without the end token, which the template writes.
        """
        with self._lock:
            if self._known.pop(text, None) is None:
                self._characters += len(text)
            self._known[text] = list(ids)
            while self._characters > _MOST_CHARACTERS or len(self._known) > _MOST_TEXTS:
                oldest, _ = self._known.popitem(last=False)
                self._characters -= len(oldest)
