"""Loss masks of chats against masks made by hand, and what is refused."""

import copy
import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from kvtrain.data.chat.formats import Chat
from kvtrain.data.chat.rendering import ChatRenderer
from tests.data.chat.random_chats import chats
from tests.data.chat.templates import CHATML, QWEN, SHAPES, Piece, chatml, expected_texts

SIXTY = settings(max_examples=60, deadline=None)
FEW = settings(max_examples=15, deadline=None)
ASK, SAY = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Yes."}


class ByHand:
    """Masks made by hand, with bytes counted by the tokens' own letters, one a byte, and not by offsets."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = {number: token.content.encode() for number, token in tokenizer.added_tokens_decoder.items()}

    def mask(self, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
        """Ids of the whole text, and for each token whether its first byte is one that the assistant says."""
        said = [learned for text, learned in pieces for _ in text.encode()]
        ids = self.tokenizer.encode("".join(text for text, _ in pieces), add_special_tokens=False)
        mask, place = [], 0
        for number, token in zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True):
            mask.append(said[place])
            place += len(self.added.get(number, token))
        assert place == len(said)
        return ids, mask


@pytest.fixture(scope="module")
def by_hand(chat_tokenizer: Any) -> ByHand:
    return ByHand(chat_tokenizer)


@pytest.fixture(scope="module")
def renderer(chat_tokenizer: Any) -> Any:
    """Makes renderers, one a template."""
    return functools.cache(lambda template: ChatRenderer(chat_tokenizer, template))


def encoded(renderer: ChatRenderer, chat: Chat) -> list[tuple[list[int], list[bool]]]:
    return [(text.ids, text.targets.tolist()) for text in renderer.encode(chat)]


@pytest.mark.parametrize("name", SHAPES)
@SIXTY
@given(data=st.data())
def test_masks_are_those_made_by_hand(renderer: Any, by_hand: ByHand, name: str, data: Any):
    shape = SHAPES[name]
    chat = data.draw(chats(tools=shape.tools))
    assert encoded(renderer(shape.template), chat) == [by_hand.mask(pieces) for pieces in expected_texts(shape, chat)]


def test_offsets_that_leave_white_space_out_change_nothing(chat_tokenizer: Any, by_hand: ByHand):
    """Llama's own tokenizer reports such offsets, by which the line break before an answer would lie inside it."""
    trimming = copy.deepcopy(chat_tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for text in ("Yes.", "  yes", "\n\n  x\n"):
        chat = Chat([ASK, {"role": "assistant", "content": text}], None, "here")
        assert encoded(ChatRenderer(trimming, CHATML), chat) == [by_hand.mask(chatml(chat, chat.messages))]


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}",
            ["Yes.<|im_end|>", "No!<|im_end|>"],
        ),
        ("{%- generation -%}{{ message.content }}{%- endgeneration -%}<|im_end|>", ["Yes.<|im_end|>", "No!<|im_end|>"]),
        (
            "{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}",
            ["Yes.<|im_end|>\n\n", "No!<|im_end|>\n\n"],  # one token with the line break behind
        ),
        ("<|im_end|>{% generation %}{{ message.content }}{% endgeneration %}", ["Yes.", "No!"]),
    ],
)
def test_a_template_that_marks_answers_is_believed(chat_tokenizer: Any, block: str, words: list[str]):
    """The stop token is learned even where the marks leave it out."""
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}"
        + block
        + "{% else %}{{ message.content }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    chat = Chat([ASK, SAY, ASK, {"role": "assistant", "content": "No!"}, ASK], None, "here")
    ((ids, mask),) = encoded(ChatRenderer(chat_tokenizer, template), chat)
    own = chat_tokenizer.apply_chat_template(
        chat.messages[:4], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == own["input_ids"]
    assert all(learned for learned, theirs in zip(mask, own["assistant_masks"], strict=True) if theirs)
    learned = [number for number, is_learned in zip(ids, mask, strict=True) if is_learned]
    assert chat_tokenizer.decode(learned) == "".join(words)


def test_tools_and_arguments_reach_the_template(chat_tokenizer: Any):
    renderer = ChatRenderer(chat_tokenizer, "{{ tools | tojson + tone }}" + CHATML, {"tone": "calm"})
    first = chat_tokenizer.decode(next(renderer.encode(Chat([ASK, SAY], [{"name": "f"}], "here"))).ids)
    assert first.startswith('[{"name": "f"}]calm<|im_start|>user')


def test_what_is_counted(renderer: Any):
    counting = ChatRenderer(renderer(QWEN).tokenizer, QWEN)
    list(counting.encode(Chat([ASK, SAY, ASK, SAY], None, "here")))
    list(counting.encode(Chat([ASK, SAY], None, "here")))
    counts = counting.counts
    assert (counts.chats, counts.answers, counts.texts, counts.split) == (2, 3, 3, 1)
    assert (counts.straddling, counts.endless) == (0, 0)
    plain = ChatRenderer(counting.tokenizer, "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}")
    list(plain.encode(Chat([ASK, SAY], None, "here")))
    assert plain.counts.endless == 1
    broken = {"role": "assistant", "content": "\n\nYes."}
    chatml_counting = ChatRenderer(counting.tokenizer, CHATML)
    list(chatml_counting.encode(Chat([ASK, broken], None, "here")))
    assert chatml_counting.counts.straddling == 1


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        (CHATML, "<|im_end|>"),
        (QWEN, "<|im_end|>"),
        ("{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}", None),
        ("{{ raise_exception('I want tools') }}", None),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn') }}{% endif %}" + CHATML,
            "<|im_end|>",
        ),
    ],
)
def test_the_token_that_ends_an_answer(chat_tokenizer: Any, template: str, stop: str | None):
    found = ChatRenderer(chat_tokenizer, template).stop_token_id()
    assert found == (None if stop is None else chat_tokenizer.convert_tokens_to_ids(stop))


PROMPTS_A_THOUGHT = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            PROMPTS_A_THOUGHT,
            "x.jsonl row 3: answer 1: the chat template asks for it by another beginning than it has: ",
        ),
        (
            PROMPTS_A_THOUGHT,
            "im_start|>assistant\\n' the generation prompt writes '<think>\\n' and the answer 'Yes.<|im_end|>\\n'",
        ),
        ("{{ messages[0].content }}", "x.jsonl row 3: answer 1: the chat template writes nothing for it"),
        (
            CHATML.replace("message.content", "(message.content[0].text if message.content is not string else '')"),
            "x.jsonl row 3: answer 1: the chat template leaves out what it says ('Yes.'); give another chat template",
        ),
        ("{{ raise_exception('no such role') }}", "x.jsonl row 3: the chat template fails on it (no such role)"),
        ("{{ messages[0].nothing.at_all }}", "x.jsonl row 3: the chat template fails on it ("),
        ("{% for", "x.jsonl row 3: the chat template fails on it ("),
        ("{% generation %}x{% endgeneration %}", "x.jsonl row 3: answer 1: the chat template leaves out what it says"),
        (
            "x{% generation %}{% endgeneration %}",
            "x.jsonl row 3: what the chat template marks by {% generation %} is empty",
        ),
    ],
)
def test_templates_that_are_refused(chat_tokenizer: Any, template: str, words: str):
    with pytest.raises(ValueError, match=r"x\.jsonl row 3") as caught:
        list(ChatRenderer(chat_tokenizer, template).encode(Chat([ASK, SAY], None, "x.jsonl row 3")))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused(chat_tokenizer: Any):
    with pytest.raises(
        ValueError, match=r"give one, or its file, as data\.chat_template of the recipe or as --chat-template of"
    ):
        ChatRenderer(chat_tokenizer)
