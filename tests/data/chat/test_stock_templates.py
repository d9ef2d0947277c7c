"""Stock chat templates as TRL carries them, read when the test runs and skipped where they are not installed.

None of them marks its answers. Masks are made by hand from the whole text: an answer stands between its header and its
stop token, neither of which our random chats hold. TRL also carries some of them with marks added, whose masks
transformers makes: an independent second opinion.
"""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.data.chat.formats import Chat
from kvtrain.data.chat.rendering import ChatRenderer
from tests.data.chat.random_chats import chats
from tests.data.chat.templates import qwen_goes_on

SIXTY = settings(max_examples=60, deadline=None)
FEW = settings(max_examples=15, deadline=None)


class Stock(NamedTuple):
    """A template's file, where its answers stand, and whether it has tools."""

    file: str
    answer: str = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
    tools: bool = False
    forgets: bool = False  # leaves out earlier thoughts


STOCK = {
    "Llama 3.1": Stock(
        "llama3_1", r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)", tools=True
    ),
    "Qwen3": Stock("qwen3", tools=True, forgets=True),
    "Gemma 3": Stock("gemma3", r"<start_of_turn>model\n(.*?<end_of_turn>)"),
    "Mistral": Stock("mistral"),
    "ChatML": Stock("chatml"),
    "SmolLM2": Stock("smollm2"),
}
MARKED = ("gemma3", "llama3")  # those that write an earlier answer as it was


def template(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip(f"{name}.jinja: trl is not installed")
    path = Path(spec.origin).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"{name}.jinja: no installed package carries it")
    return path.read_text()


def by_hand(renderer: ChatRenderer, stock: Stock, chat: Chat) -> list[tuple[list[int], list[bool]]]:
    """Ids and masks: spans by the answers' headers and stop tokens, tokens by the characters they decode to."""
    groups: list[list[int]] = []
    for number, answer in enumerate(chat.answers):
        stays = number and (not stock.forgets or qwen_goes_on(chat, chat.answers[number - 1], answer))
        groups = [*groups[:-1], [*groups[-1], number]] if stays else [*groups, [number]]
    found = []
    for group in groups:
        text = renderer.tokenizer.apply_chat_template(
            chat.messages[: chat.answers[group[-1]] + 1],
            tools=chat.tools,
            chat_template=renderer.template,
            tokenize=False,
        )
        spans = [match.span(1) for match in re.finditer(stock.answer, text, re.DOTALL)]
        assert len(spans) == group[-1] + 1
        kept = [[len(text[:place].encode()) for place in spans[number]] for number in group]
        ids = renderer.tokenizer.encode(text, add_special_tokens=False)
        mask, place = [], 0
        added = renderer.tokenizer.added_tokens_decoder
        for number, token in zip(ids, renderer.tokenizer.convert_ids_to_tokens(ids), strict=True):
            mask.append(any(begin <= place < end for begin, end in kept))
            place += len(added[number].content.encode() if number in added else token)
        found.append((ids, mask))
    return found


@functools.cache
def renderer(tokenizer: Any, name: str) -> ChatRenderer:
    return ChatRenderer(tokenizer, template(name))


@pytest.mark.roads
@pytest.mark.parametrize("name", STOCK)
@SIXTY
@given(data=st.data())
def test_masks_of_stock_templates_are_those_made_by_hand(chat_tokenizer: Any, name: str, data: Any):
    stock = STOCK[name]
    subject = renderer(chat_tokenizer, stock.file)
    chat = data.draw(chats(tools=stock.tools))
    found = [(text.ids, text.targets.tolist()) for text in subject.encode(chat)]
    assert found == by_hand(subject, stock, chat)


@pytest.mark.roads
@pytest.mark.parametrize("name", MARKED)
@FEW
@given(data=st.data())
def test_prefixes_find_what_marks_say(chat_tokenizer: Any, name: str, data: Any):
    """Less the line break behind a stop token, which some marks hold, and nobody generates."""
    plain, marked = renderer(chat_tokenizer, name), renderer(chat_tokenizer, f"{name}_training")
    chat = data.draw(chats())
    ((ids, mask, _),) = plain.encode(chat)
    ((marked_ids, marked_mask, _),) = marked.encode(chat)
    assert ids == marked_ids
    stops = {number for number, token in chat_tokenizer.added_tokens_decoder.items() if token.special}
    behind = [place > 0 and ids[place - 1] in stops and not chat_tokenizer.decode([ids[place]]).strip()
              for place in range(len(ids))]  # fmt: skip
    theirs = [learned and not is_behind for learned, is_behind in zip(marked_mask.tolist(), behind, strict=True)]
    assert mask.tolist() == theirs
