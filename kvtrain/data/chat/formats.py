"""The forms in which chats are published, as one: a list of messages with roles, and tools.

Read are ``messages`` (OpenAI's form), ``conversations`` (ShareGPT's, ``from`` and ``value``) and ``prompt`` with
``completion``, texts or lists of messages. A column ``system`` holds a system turn, ``tools`` the functions on offer.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from kvtrain.data.rows import require_encodable

Message = dict[str, Any]
MESSAGE_COLUMNS = ("messages", "conversations")
PROMPT, COMPLETION = "prompt", "completion"

_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "ipython"), "tool"),
}
# Which roles may follow which; "" stands for the beginning.
_FOLLOWERS = {
    "": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


@dataclass(frozen=True)
class Chat:
    """One conversation.

    Attributes:
        messages: Turns in order, each with a ``role`` and what templates read besides: ``content``, ``tool_calls`` ...
        tools: Functions that the assistant may call, as JSON schemas; None without any.
        source: Where it came from, for messages to the user.
    """

    messages: list[Message]
    tools: list[Any] | None
    source: str

    @property
    def answers(self) -> list[int]:
        """Places of the assistant's turns."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def key(self) -> int:
        """A number of 64 bits that depends on what is said alone, so that the same chat is held out or not anywhere."""
        text = json.dumps([self.messages, self.tools], sort_keys=True, default=str)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def parse_chat(row: object, source: str, column: str | None = None) -> Chat:
    """Make a row a chat.

    Args:
        row: One object of a file or data set.
        source: Its place, for messages.
        column: Field that holds the messages; None looks for the known ones.

    Raises:
        ValueError: There are no messages, no assistant's turn, or roles out of order.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{source}: expected an object with {_wanted(column)}")
    messages = [_message(turn, source, number) for number, turn in enumerate(_turns(row, source, column), 1)]
    if row.get("system") and (not messages or messages[0]["role"] not in ("system", "developer")):
        messages.insert(0, {"role": "system", "content": _text(row["system"], f"{source}: field 'system'")})
    _check_order(messages, source)
    return Chat(messages, _tools(row.get("tools"), source), source)


def _turns(row: dict[str, Any], source: str, column: str | None) -> list[Any]:
    """The turns of a row, in whichever form it has."""
    names = (column,) if column else MESSAGE_COLUMNS
    name = next((name for name in names if row.get(name) is not None), None)
    if name is not None:
        if not isinstance(row[name], list):
            raise ValueError(f"{source}: field {name!r} holds {type(row[name]).__name__}, not a list of messages")
        turns: list[Any] = row[name]
        return turns
    if column is None and row.get(PROMPT) is not None and row.get(COMPLETION) is not None:
        return [*_side(row[PROMPT], "user"), *_side(row[COMPLETION], "assistant")]
    found = ", ".join(map(repr, row)) or "none"
    raise ValueError(f"{source}: no {_wanted(column)}; the columns are {found}; set messages_column to the right one")


def _wanted(column: str | None) -> str:
    return f"column {column!r}" if column else "'messages', 'conversations', or 'prompt' with 'completion'"


def _side(side: Any, role: str) -> list[Any]:
    return side if isinstance(side, list) else [{"role": role, "content": side}]


def _message(turn: object, source: str, number: int) -> Message:
    """A turn with the names that templates know."""
    where = f"{source}: message {number}"
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is {type(turn).__name__}, not an object with a role and its content")
    given = turn.get("role", turn.get("from"))
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise ValueError(f"{where} has the role {given!r}; it must be one of {known}")
    content = turn.get("content", turn.get("value"))
    others = {name: value for name, value in turn.items() if name not in ("role", "from", "content", "value")}
    others = {name: value for name, value in others.items() if value is not None}
    if given == "function_call":
        return {"role": role, "content": "", "tool_calls": [_call(content, where)], **others}
    if others.get("tool_calls"):
        others["tool_calls"] = [_call(call, where) for call in others["tool_calls"]]
        content = "" if content is None else content
    return {"role": role, "content": _text(content, f"{where}: its content"), **others}


def _text(content: object, where: str) -> str:
    """Content as text; parts of it, as OpenAI's form has them, are joined."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError(f"{where} has parts that are no text; take them out, images cannot be learned from")
        content = "".join(texts)
    if not isinstance(content, str):
        raise ValueError(f"{where} is {type(content).__name__}, not text")
    require_encodable(content, where)
    return content


def _call(call: object, where: str) -> dict[str, Any]:
    """A call of a function, its arguments as an object: templates write objects as JSON, and texts as texts."""
    outer = call if isinstance(call, dict) and "function" in call else {"function": call}
    function = outer["function"]
    if isinstance(function, str):
        function = _parsed(function, where)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} has a tool call without a function's name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _parsed(arguments, where)
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} has a tool call that is not JSON") from error


def _tools(tools: object, source: str) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, f"{source}: field 'tools'")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"{source}: field 'tools' holds {type(tools).__name__}, not a list of functions")
    return tools


def _check_order(messages: list[Message], source: str) -> None:
    """Refuse chats that no assistant would ever see so."""
    before = ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _FOLLOWERS[before]:
            place = f"follows one of role {before!r}" if before else "opens the chat"
            wanted = " or ".join(map(repr, _FOLLOWERS[before]))
            raise ValueError(f"{source}: message {number} of role {role!r} {place}, where {wanted} must stand")
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{source}: no turn of the assistant, so there is nothing to learn; take the chat out")
