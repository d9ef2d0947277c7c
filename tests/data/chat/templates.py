"""Six chat templates of known shape, written anew for these tests, and what each makes of a chat, by construction.

They have the shapes of the templates of Llama 3.1, Qwen3, Gemma 3, Mistral, ChatML and SmolLM2, not their words: what
matters is where turns begin and end, what is trimmed, and what is written otherwise once a chat goes on. ``pieces`` say
in plain Python what the text of a chat is, up to one of its answers, and which parts of it the assistant says.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvtrain.data.chat.formats import Chat

END = "<|endoftext|>"  # begins and ends texts of kvtrain:tiny
SPECIAL = (
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "[INST]",
        "[/INST]",
        "[CALLS]",
        "[RESULT]",
        "[/RESULT]",
        "[TOOLS]",
        "[/TOOLS]",
    ),
)
Piece = tuple[str, bool]  # text, and whether the assistant says it
Messages = list[dict[str, Any]]

LLAMA = """{{- bos_token }}
{%- set first = messages[0] %}
{%- set has_system = first.role == 'system' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string | default('26 Jul 2024') + '\\n\\n' }}
{{- (first.content | trim if has_system else '') + '<|eot_id|>' }}
{%- for message in (messages[1:] if has_system else messages) %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if tools and loop.first %}
        {{- 'Functions: ' + tools | tojson + '\\n\\n' }}
    {%- endif %}
    {%- if message.tool_calls %}
        {{- message.tool_calls[0].function | tojson }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

QWEN = """{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else '') }}
    {{- (('\\nTools: ' + tools | tojson) if tools else '') + '<|im_end|>\\n' }}
{%- endif %}
{%- set seen = namespace(query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set seen.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > seen.query and (loop.last or message.reasoning_content) %}
            {{- '<think>\\n' + message.reasoning_content | default('') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls | default([]) %}
            {{- '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

GEMMA = """{{ bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for message in (messages[1:] if system else messages) %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}
    {{- (system if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}"""

MISTRAL = """{{- bos_token }}
{%- set seen = namespace(query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set seen.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if loop.index0 == seen.query and tools %}
            {{- '[TOOLS] ' + tools | tojson + '[/TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' }}
        {%- if loop.index0 == seen.query and messages[0].role == 'system' %}
            {{- messages[0].content + '\\n\\n' }}
        {%- endif %}
        {{- message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[RESULT] ' + message.content + '[/RESULT]' }}
    {%- elif message.tool_calls %}
        {{- '[CALLS] ' + message.tool_calls[0].function | tojson + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

SMOLLM = (
    """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a small model.<|im_end|>\\n' }}
{%- endif %}
"""
    + CHATML
)


@dataclass(frozen=True)
class Shape:
    """A template and its text by construction.

    Attributes:
        template: Of the chat.
        pieces: Text of the first messages, of which an answer is the last; every answer in it is marked.
        goes_on: Whether an earlier answer stands in the text of the next one as it was said.
        tools: Whether it knows tools.
    """

    template: str
    pieces: Callable[[Chat, Messages], list[Piece]]
    goes_on: Callable[[Chat, int, int], bool] = lambda chat, answer, following: True
    tools: bool = False


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def called(message: dict[str, Any]) -> str | None:
    return dumped(message["tool_calls"][0]["function"]) if message.get("tool_calls") else None


def last_query(messages: Messages) -> int:
    return max(place for place, message in enumerate(messages) if message["role"] == "user")


def llama(chat: Chat, messages: Messages) -> list[Piece]:
    def header(role: str) -> Piece:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n", False

    system, turns = split_system(messages)
    pieces = [(END, False), header("system"), (f"Today: 26 Jul 2024\n\n{system.strip()}<|eot_id|>", False)]
    for number, message in enumerate(turns):
        pieces.append(header({"tool": "ipython"}.get(message["role"], message["role"])))
        if chat.tools and number == 0:
            pieces.append((f"Functions: {dumped(chat.tools)}\n\n", False))
        said = called(message) or message["content"].strip()
        pieces.append((f"{said}<|eot_id|>", message["role"] == "assistant"))
    return pieces


def qwen(chat: Chat, messages: Messages) -> list[Piece]:
    system, _ = split_system(messages)
    pieces: list[Piece] = []
    if chat.tools or messages[0]["role"] == "system":
        tools = f"\nTools: {dumped(chat.tools)}" if chat.tools else ""
        pieces.append((f"<|im_start|>system\n{system}{tools}<|im_end|>\n", False))
    for place, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "user":
            pieces.append((f"<|im_start|>user\n{content}<|im_end|>\n", False))
        elif message["role"] == "tool":
            response = f"<tool_response>\n{content}\n</tool_response>"
            pieces.append((f"<|im_start|>user\n{response}<|im_end|>\n", False))
        elif message["role"] == "assistant":
            thought, is_last = message.get("reasoning_content", ""), place == len(messages) - 1
            thinks = place > last_query(messages) and (is_last or thought)
            thinking = f"<think>\n{thought}\n</think>\n\n" if thinks else ""
            call = f"<tool_call>\n{called(message)}\n</tool_call>" if called(message) else ""
            pieces += [
                ("<|im_start|>assistant\n", False),
                (f"{thinking}{content}{call}<|im_end|>", True),
                ("\n", False),
            ]
    return pieces


def qwen_goes_on(chat: Chat, answer: int, following: int) -> bool:
    """A thought stays until the next question; an empty one is written behind the last answer alone."""
    between = [message["role"] for message in chat.messages[answer + 1 : following]]
    return "user" not in between and bool(chat.messages[answer].get("reasoning_content"))


def gemma(chat: Chat, messages: Messages) -> list[Piece]:
    system, turns = split_system(messages)
    pieces = [(END, False)]
    for number, message in enumerate(turns):
        before = f"{system}\n\n" if number == 0 and len(turns) < len(messages) else ""
        if message["role"] == "assistant":
            pieces += [("<start_of_turn>model\n", False), (f"{message['content'].strip()}<end_of_turn>", True)]
            pieces.append(("\n", False))
        else:
            pieces.append((f"<start_of_turn>user\n{before}{message['content'].strip()}<end_of_turn>\n", False))
    return pieces


def mistral(chat: Chat, messages: Messages) -> list[Piece]:
    pieces = [(END, False)]
    for place, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "user":
            is_query = place == last_query(messages)
            tools = f"[TOOLS] {dumped(chat.tools)}[/TOOLS]" if is_query and chat.tools else ""
            has_system = is_query and messages[0]["role"] == "system"
            system = f"{messages[0]['content']}\n\n" if has_system else ""
            pieces.append((f"{tools}[INST] {system}{content}[/INST]", False))
        elif message["role"] == "tool":
            pieces.append((f"[RESULT] {content}[/RESULT]", False))
        elif message["role"] == "assistant":
            said = f"[CALLS] {called(message)}" if called(message) else f" {content.strip()}"
            pieces.append((f"{said}{END}", True))
    return pieces


def mistral_goes_on(chat: Chat, answer: int, following: int) -> bool:
    """System turn and tools move to the latest question."""
    between = [message["role"] for message in chat.messages[answer + 1 : following]]
    return "user" not in between or not (chat.tools or chat.messages[0]["role"] == "system")


def chatml(chat: Chat, messages: Messages) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces


def smollm(chat: Chat, messages: Messages) -> list[Piece]:
    default = [] if messages[0]["role"] == "system" else ["<|im_start|>system\nYou are a small model.<|im_end|>\n"]
    return [*((text, False) for text in default), *chatml(chat, messages)]


def split_system(messages: Messages) -> tuple[str, Messages]:
    has_system = messages[0]["role"] == "system"
    return (messages[0]["content"], messages[1:]) if has_system else ("", messages)


SHAPES = {
    "llama": Shape(LLAMA, llama, tools=True),
    "qwen": Shape(QWEN, qwen, qwen_goes_on, tools=True),
    "gemma": Shape(GEMMA, gemma),
    "mistral": Shape(MISTRAL, mistral, mistral_goes_on, tools=True),
    "chatml": Shape(CHATML, chatml),
    "smollm": Shape(SMOLLM, smollm),
}


def expected_texts(shape: Shape, chat: Chat) -> list[list[Piece]]:
    """The texts that a chat becomes: an answer joins the one before where that stays as it was said."""
    texts: list[list[Piece]] = []
    own: list[int] = []  # answers of the latest text
    for number, answer in enumerate(chat.answers):
        pieces = shape.pieces(chat, chat.messages[: answer + 1])
        if number and shape.goes_on(chat, chat.answers[number - 1], answer):
            own.append(number)
            texts.pop()
        else:
            own = [number]
        said = [place for place, (_, learned) in enumerate(pieces) if learned]
        kept = {said[one] for one in own}
        texts.append([(text, place in kept) for place, (text, _) in enumerate(pieces)])
    return texts
