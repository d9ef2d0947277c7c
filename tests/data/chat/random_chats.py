"""Random chats: any number of turns, system turns, tools, thoughts, white space, long characters, no content."""

from typing import Any

from hypothesis import strategies as st

from kvtrain.data.chat.formats import Chat

_WORDS = (
    "yes",
    "12 + 7 = 19",
    "naïve",
    "日本語",
    "👩‍🚀🚀",
    "é",
    "def f(x):\n    return x",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "a",
    ".",
    "<b>",
    " the",
)
_TOOL = {"type": "function", "function": {"name": "add", "description": "Adds ü.", "parameters": {"a": 1}}}
contents = st.lists(st.sampled_from(_WORDS), max_size=5).map("".join)
seen = st.lists(st.sampled_from(_WORDS), max_size=4).map(lambda words: "q" + "".join(words))
calls = st.integers(0, 99).map(lambda n: [{"type": "function", "function": {"name": "add", "arguments": {"a": n}}}])


@st.composite
def answers(draw: Any, tools: bool) -> list[dict[str, Any]]:
    """What comes after a question: an answer, or calls with their results and then an answer."""
    turns: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 2)) if tools else 0):
        turns.append({"role": "assistant", "content": "", "tool_calls": draw(calls)})
        turns.append({"role": "tool", "content": draw(contents)})
    turns.append({"role": "assistant", "content": draw(contents)})
    for turn in turns[::2]:
        if draw(st.booleans()):
            turn["reasoning_content"] = draw(seen).strip("\n")
    return turns


@st.composite
def chats(draw: Any, tools: bool = False) -> Chat:
    """A chat; where tools are allowed, some have them."""
    has_tools = tools and draw(st.booleans())
    messages = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(contents)}, *draw(answers(has_tools))]
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(contents)})
    return Chat(messages, [_TOOL] if has_tools else None, "here")
