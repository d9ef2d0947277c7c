"""Chats as tokens: one rendering by the chat template, and which of its tokens the assistant has to say.

Where a template marks them (``{% generation %}``) transformers says which tokens are the assistant's. Most templates
do not. There a turn is what stands between two renderings of the chat: up to the turn with the generation prompt, which
is what the model reads when it has to answer, and with the turn. A template whose generation prompt does not begin the
turn is refused: the model would learn to answer what it will never be asked.

Some templates write an answer otherwise once the chat goes on (Qwen3's leaves out earlier thoughts). Then the whole
chat shows no earlier answer as it was generated, but each rendering that ends with an answer does. Such a chat becomes
several texts, and in each those answers are learned that stand there as they are generated; none is learned twice.

A text is tokenised once and whole. A token is learned if it begins inside a turn. A turn ends with its stop token;
white space behind that, which nobody generates, is left out.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtrain.data.chat.formats import Chat, Message
from kvtrain.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Mask = npt.NDArray[np.bool_]
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SHOWN = 24  # characters of a rendering in messages


class Span(NamedTuple):
    """Characters of a rendering that the assistant has to say."""

    begin: int
    end: int


class Rendering(NamedTuple):
    """A text to learn, and the assistant's turns in it."""

    text: str
    spans: list[Span]


class EncodedText(NamedTuple):
    """Tokens ``(T,)`` of a text, which of them are learned ``(T,)``, and the text's bytes."""

    ids: list[int]
    targets: Mask
    num_bytes: int


@dataclass
class RenderingCounts:
    """What became of the chats so far.

    Attributes:
        chats: Chats read.
        answers: Turns of the assistant in them.
        texts: Texts that they became.
        split: Chats that became several, because their template writes earlier answers otherwise.
        straddling: Turns whose first token begins in the prompt, and is not learned.
        endless: Turns without a stop token.
    """

    chats: int = 0
    answers: int = 0
    texts: int = 0
    split: int = 0
    straddling: int = 0
    endless: int = 0


@dataclass
class ChatRenderer:
    """Renders and tokenises chats.

    Args:
        tokenizer: Fast tokenizer.
        template: Chat template; None takes the tokenizer's own.
        arguments: What the template is given besides, such as ``{"enable_thinking": False}``.

    Attributes:
        counts: What became of the chats so far.

    Raises:
        ValueError: There is no template.
    """

    tokenizer: "PreTrainedTokenizerFast"
    template: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from tokenizers import Tokenizer, processors

        if self.template is None and not self.tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; give one, or its file, as data.chat_template of the recipe or as "
                "--chat-template of kvtrain prepare"
            )
        self.counts = RenderingCounts()
        # Byte-level tokenizers trim white space off the offsets that they report, and turns may begin with some.
        self._encoder = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        self._encoder.post_processor = processors.ByteLevel(trim_offsets=False)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        added = {number: token.content for number, token in self.tokenizer.added_tokens_decoder.items()}
        self._stop_ids = {number for number, content in added.items() if not content.isspace()}
        self._stops = tuple(added[number] for number in sorted(self._stop_ids))

    @property
    def chat_template(self) -> str | dict[str, str]:
        """The template, or several by name, as a tokenizer holds them."""
        template: str | dict[str, str] = self.template or self.tokenizer.chat_template
        return template

    def stop_token_id(self) -> int | None:
        """The token that ends an answer; None where the template writes none, or nothing for a chat of two turns."""
        turns = [{"role": role, "content": "1"} for role in ("system", "user", "assistant")]
        for messages in (turns[1:], turns):  # some templates want the first, some refuse it
            renderer = ChatRenderer(self.tokenizer, self.template, self.arguments)
            try:
                *_, text = renderer.encode(Chat(messages, None, "two turns"))
            except ValueError:
                continue
            learned = np.asarray(text.ids)[text.targets]
            return int(learned[-1]) if learned.size and learned[-1] in self._stop_ids else None
        return None

    def encode(self, chat: Chat) -> Iterator[EncodedText]:
        """Tokens and loss masks of a chat's texts, mostly one.

        Raises:
            ValueError: The template fails, or hides what the assistant says; with the chat's place.
        """
        self.counts.chats += 1
        self.counts.answers += len(chat.answers)
        if self._marks_answers(chat):
            texts = [self._marked(chat)]
        else:
            renderings = self.render(chat)
            encodings = self._encoder.encode_batch([one.text for one in renderings], add_special_tokens=False)
            texts = [
                EncodedText(
                    encoding.ids, self._targets(encoding.offsets, rendering.spans), len(rendering.text.encode())
                )
                for encoding, rendering in zip(encodings, renderings, strict=True)
            ]
        self.counts.texts += len(texts)
        self.counts.split += len(texts) > 1
        yield from texts

    def render(self, chat: Chat) -> list[Rendering]:
        """A chat's texts, and in them the assistant's turns, found by rendering the chat up to each.

        Raises:
            ValueError: As ``encode``.
        """
        renderings: list[Rendering] = []
        for number, place in enumerate(chat.answers, 1):
            prompt = self._apply(chat, place, add_generation_prompt=True)
            text = self._apply(chat, place + 1)
            span = self._span(prompt, text, f"{chat.source}: answer {number}")
            _require_said(chat.messages[place], text[span.begin :], f"{chat.source}: answer {number}")
            if renderings and text.startswith(renderings[-1].text):
                renderings[-1] = Rendering(text, [*renderings[-1].spans, span])
            else:
                renderings.append(Rendering(text, [span]))
        return renderings

    def _span(self, prompt: str, text: str, where: str) -> Span:
        """What the assistant says after a prompt, up to its stop token."""
        if not text.startswith(prompt):
            place = next((n for n, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1]), len(text))
            raise ValueError(
                f"{where}: the chat template asks for it by another beginning than it has: after "
                f"{prompt[:place][-_SHOWN:]!r} the generation prompt writes {prompt[place:][:_SHOWN]!r} and the answer "
                f"{text[place:][:_SHOWN]!r}; give a chat template that begins both alike or marks answers by "
                "{% generation %}, or template_arguments with which it does, such as enable_thinking: false"
            )
        end = len(text.rstrip())
        if end <= len(prompt) or not text.endswith(self._stops, 0, end):
            end = len(text)
            self.counts.endless += 1
        if end == len(prompt):
            raise ValueError(f"{where}: the chat template writes nothing for it; give another chat template")
        return Span(len(prompt), end)

    def _targets(self, offsets: list[tuple[int, int]], spans: list[Span]) -> Mask:
        """Which tokens begin inside a turn."""
        begins, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
        targets = np.zeros(begins.size, dtype=bool)
        for span in spans:
            targets |= (begins >= span.begin) & (begins < span.end)
            self.counts.straddling += bool(((begins < span.begin) & (ends > span.begin)).any())
        return targets

    def _marks_answers(self, chat: Chat) -> bool:
        template = self.tokenizer.get_chat_template(self.template, chat.tools)
        return _GENERATION.search(template) is not None

    def _marked(self, chat: Chat) -> EncodedText:
        """A chat whose template marks the answers: transformers' mask, and stop tokens right behind the marks."""
        length, options = chat.answers[-1] + 1, {"return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self._apply(chat, length, tokenize=True, tokenizer_kwargs={"verbose": False}, **options)
        ids, targets = encoded["input_ids"], np.asarray(encoded["assistant_masks"], dtype=bool)
        if not targets.any():
            raise ValueError(
                f"{chat.source}: what the chat template marks by {{% generation %}} is empty; give another"
            )
        self._add_stops(ids, targets)
        said = str(self.tokenizer.decode(np.asarray(ids)[targets].tolist(), skip_special_tokens=False))
        _require_said(chat.messages[length - 1], said, f"{chat.source}: answer {len(chat.answers)}")
        return EncodedText(ids, targets, len(self._apply(chat, length).encode()))

    def _add_stops(self, ids: list[int], targets: Mask) -> None:
        """Learn the stop token where the marks leave it out: what follows the last answer's can be nothing else."""
        ends = np.flatnonzero(targets & ~np.append(targets[1:], False))
        stop = ids[ends[-1] + 1] if ends[-1] + 1 < len(ids) else None
        if stop in self._stop_ids:
            targets[[end + 1 for end in ends if ids[end + 1] == stop]] = True

    def _apply(self, chat: Chat, length: int, *, tokenize: bool = False, **options: Any) -> Any:
        """The template on the first messages of a chat."""
        try:
            return self.tokenizer.apply_chat_template(
                chat.messages[:length],
                tools=chat.tools,
                chat_template=self.template,
                tokenize=tokenize,
                **options,
                **self.arguments,
            )
        except Exception as error:  # a template is a program, which may fail in any way
            raise ValueError(f"{chat.source}: the chat template fails on it ({first_line(error)})") from error


def _require_said(message: Message, rendered: str, where: str) -> None:
    """Refuse a template that leaves out what an answer says, as those do that want its content in parts.

    Thoughts before it may be moved, and a call of a tool may stand in its place.
    """
    words = message["content"].split()
    if words and not message.get("tool_calls") and words[-1] not in rendered:
        raise ValueError(
            f"{where}: the chat template leaves out what it says ({words[-1][:_SHOWN]!r}); give another chat template"
        )
