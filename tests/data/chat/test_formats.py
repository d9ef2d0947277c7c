"""The forms in which chats are published, and what is refused, with file and row."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from kvtrain.data.chat import corpus as corpus_module
from kvtrain.data.chat.corpus import read_chats, require_chats
from kvtrain.data.chat.examples import NUM_CHATS, example_chats, write_examples
from kvtrain.data.chat.formats import parse_chat

ASK, SAY = {"role": "user", "content": "7 + 1?"}, {"role": "assistant", "content": "8."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 7}}}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, SAY]},
        {"messages": [{**ASK, "name": None}, SAY], "tools": None, "conversations": None},
        {"conversations": [{"from": "human", "value": "7 + 1?"}, {"from": "gpt", "value": "8."}]},
        {"conversations": [ASK, SAY]},
        {"messages": [{"from": "user", "value": "7 + 1?"}, {"role": "model", "content": "8."}]},
        {"prompt": "7 + 1?", "completion": "8."},
        {"prompt": [ASK], "completion": [SAY], "tools": []},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "7 + "}, {"type": "text", "text": "1?"}]},
                SAY,
            ]
        },
    ],
)
def test_every_form_is_the_same_chat(row: dict[str, Any]):
    chat = parse_chat(row, "here")
    assert (chat.messages, chat.tools, chat.source, chat.answers) == ([ASK, SAY], None, "here", [1])


def test_what_goes_with_a_chat():
    assert parse_chat({"system": "Be brief.", "prompt": "a", "completion": "b"}, "here").messages == [
        {"role": "system", "content": "Be brief."},
        user("a"),
        said("b"),
    ]
    assert parse_chat({"talk": [ASK, SAY]}, "here", "talk").messages == [ASK, SAY]
    thinking = {**SAY, "reasoning_content": "easy"}
    assert parse_chat({"messages": [ASK, thinking]}, "here").messages == [ASK, thinking]
    tools = [{"type": "function", "function": {"name": "add"}}]
    chat = parse_chat({"messages": [ASK, SAY], "tools": json.dumps(tools)}, "here")
    assert chat.tools == tools


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 7}'}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 7}}]},
    ],
)
def test_calls_of_tools_have_one_form(turn: dict[str, Any]):
    chat = parse_chat({"messages": [ASK, turn, {"role": "tool", "content": "8"}, SAY]}, "here")
    assert chat.messages == [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "8"},
        SAY,
    ]


def test_calls_of_tools_in_sharegpt_form():
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 7}}'}
    turns = [{"from": "human", "value": "7 + 1?"}, call, {"from": "observation", "value": "8"}, SAY]
    chat = parse_chat({"conversations": turns}, "here")
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.answers == [1, 3]


def test_the_key_is_of_what_is_said():
    one, other = parse_chat({"messages": [ASK, SAY]}, "a"), parse_chat({"prompt": "7 + 1?", "completion": "8."}, "b")
    assert one.key == other.key != parse_chat({"messages": [ASK, said("9.")]}, "a").key


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([ASK], "expected an object with 'messages', 'conversations', or 'prompt' with 'completion'"),
        ({"text": "a", "id": 3}, "the columns are 'text', 'id'; set messages_column to the right one"),
        (
            {"prompt": "a"},
            "no 'messages', 'conversations', or 'prompt' with 'completion'; the columns are 'prompt'; set",
        ),
        ({"messages": "a"}, "field 'messages' holds str, not a list of messages"),
        ({"messages": [ASK]}, "no turn of the assistant, so there is nothing to learn; take the chat out"),
        ({"messages": []}, "no turn of the assistant"),
        (
            {"messages": [SAY, ASK]},
            "message 1 of role 'assistant' opens the chat, where 'system' or 'developer' or 'user' m",
        ),
        (
            {"messages": [ASK, ASK, SAY]},
            "message 2 of role 'user' follows one of role 'user', where 'assistant' must stand",
        ),
        (
            {"messages": [ASK, SAY, SAY]},
            "message 3 of role 'assistant' follows one of role 'assistant', where 'user' or",
        ),
        ({"messages": [ASK, SAY, {"role": "system", "content": "x"}]}, "message 3 of role 'system' follows"),
        (
            {"messages": [ASK, {"role": "robot", "content": "x"}]},
            "message 2 has the role 'robot'; it must be one of system,",
        ),
        ({"messages": [ASK, {"role": "assistant", "content": 3}]}, "message 2: its content is int, not text"),
        ({"messages": [ASK, {"role": "assistant"}]}, "message 2: its content is NoneType, not text"),
        ({"messages": ["hello"]}, "message 1 is str, not an object with a role and its content"),
        ({"messages": [ASK, said("\ud800")]}, "message 2: its content holds half a surrogate pair"),
        ({"messages": [user([{"type": "image"}]), SAY]}, "message 1: its content has parts that are no text"),
        (
            {"messages": [ASK, {**SAY, "tool_calls": [{"id": 1}]}]},
            "message 2 has a tool call without a function's name",
        ),
        ({"messages": [ASK, {**SAY, "tool_calls": ["{"]}]}, "message 2 has a tool call that is not JSON"),
        ({"messages": [ASK, SAY], "tools": {"a": 1}}, "field 'tools' holds dict, not a list of functions"),
        ({"messages": [ASK, SAY], "tools": "{"}, "field 'tools' has a tool call that is not JSON"),
    ],
)
def test_what_is_refused(row: Any, words: str):
    with pytest.raises(ValueError, match=r"^x\.jsonl row 4: ") as caught:
        parse_chat(row, "x.jsonl row 4")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"messages": [user(str(number)), said("é")]} for number in range(3)]
    (tmp_path / "a.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text("# Chats")
    (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    table = [*rows[:2], {"messages": [user("2"), {**SAY, "tool_calls": [CALL]}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "hub" / "data" / "train.parquet")
    sources = {
        kind: [(chat.messages[0]["content"], chat.source) for chat in read_chats(str(tmp_path / kind))]
        for kind in ("a.jsonl", "b.json", "hub")
    }
    assert sources["a.jsonl"] == [(str(n), f"{tmp_path}/a.jsonl row {n + 2}") for n in range(3)]
    assert sources["b.json"] == [(str(n), f"{tmp_path}/b.json item {n + 1}") for n in range(3)]
    assert sources["hub"] == [(str(n), f"{tmp_path}/hub/data/train.parquet row {n + 1}") for n in range(3)]
    last = list(read_chats(str(tmp_path / "hub")))
    assert "tool_calls" not in last[0].messages[1] and last[2].messages[1]["tool_calls"] == [CALL]
    monkeypatch.setattr(corpus_module, "hub_rows", lambda name, split: iter([{**rows[0], "tools": None}]))
    assert [chat.source for chat in read_chats("hf:a/b")] == ["hf:a/b row 1"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"messages": [\n', "a.jsonl row 1: not JSON"),
        ("a.jsonl", '{"a": 1}\n', "a.jsonl row 1: no 'messages'"),
        ("a.json", '{"messages": []}', "a.json: holds one dict, not a list of chats; write a chat a line as .jsonl"),
        ("a.json", '[{"messages":\n ]', "a.json: not JSON (Expecting value, line 2 column 2)"),
        ("a.txt", "User: hi", "a.txt: cannot read '.txt' files; convert to .jsonl, .parquet, .json"),
        ("a.parquet", "PAR1", "a.parquet: not a readable parquet file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, words: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path}/{words}')}"):
        list(read_chats(str(tmp_path / name)))


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file or folder"):
        require_chats(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"the folder holds no \.jsonl, \.parquet file"):
        require_chats(str(tmp_path))
    require_chats("examples")
    require_chats("hf:a/b")


def test_the_examples_are_the_same_everywhere(tmp_path: Path):
    chats = list(example_chats())
    assert len(chats) == NUM_CHATS == len({chat.key for chat in chats})
    assert chats[0].messages[0] == user("What is 7 + 1?") and chats[0].messages[1] == said("7 + 1 is 8.")
    assert chats[-1].key == 17839248371123238333
    write_examples(tmp_path / "e.jsonl")
    assert [chat.key for chat in read_chats(str(tmp_path / "e.jsonl"))] == [chat.key for chat in chats]
