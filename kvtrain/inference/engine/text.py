"""Text of tokens as they come: whole characters alone, and nothing that may yet become a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StopFinder:
    """Ends a text before the first stop string, wherever its pieces are cut.

    Args:
        stops: Strings that end the text.

    Attributes:
        found: The one that did.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """What of the text so far may be shown, after the next piece of it."""
        if not self._stops or self.found is not None:
            return piece if self.found is None else ""
        text = self._held + piece
        matches = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if matches:
            end, self.found = min(matches, key=lambda match: (match[0], -len(match[1])))
            self._held = ""
            return text[:end]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when no piece will follow."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class TextStream:
    """Text of one answer.

    Args:
        tokenizer: Whose tokens they are.
        stops: Strings that end it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stops = StopFinder(stops)
        self._pending: list[int] = []  # tokens since the last whole character

    @property
    def stop(self) -> str | None:
        """The stop string that has ended the text."""
        return self._stops.found

    def push(self, token_id: int) -> str:
        """What may be shown after the next token."""
        self._pending.append(token_id)
        piece = self._decoder.step(self._tokenizer, token_id)
        if piece is None:
            return ""
        self._pending.clear()
        return self._stops.push(piece)

    def flush(self) -> str:
        """What is left at the end; an unfinished character as replacement characters, as ``decode`` gives them."""
        if self.stop is not None:
            return ""
        text = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        self._pending.clear()
        return self._stops.push(text) + self._stops.flush()
