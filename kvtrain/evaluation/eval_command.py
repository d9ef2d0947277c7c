"""``kvtrain eval``: what is wrong with the command line is said before a model is read."""

import json
from argparse import Namespace
from itertools import groupby
from pathlib import Path
from typing import Any

from kvtrain.errors import require_file_place
from kvtrain.parser import Parser, add_device_argument, add_method_argument
from kvtrain.tables import cell, print_table

_BYTES = ("kv_bytes_mean", "kv_bytes_end", "kv_bytes_peak")
_JSON_ALONE = ("method", "trained", "measured_on", "metric", "better", *_BYTES)


def add_arguments(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="exported folder, Hub id or kvtrain:tiny")
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="A,B",
        help="perplexity, continuation, passkey, retrieval, ruler:LENGTH, ruler:LENGTH:KIND, lm-eval:NAME, "
        "lm-eval:FILE.yaml, reasoning:NAME or reasoning:NAME:TOKENS of an answer (256); several with commas",
    )
    add_method_argument(parser)
    add_device_argument(parser)
    parser.add_argument("--corpus", default="heldout", help="text to measure on, or to hide things in (heldout)")
    parser.add_argument("--sequence-length", type=int, default=1024, metavar="N", help="tokens of each (1024)")
    parser.add_argument("--stride", type=int, metavar="N", help="score the last N tokens of a window alone (all)")
    parser.add_argument("--limit", type=int, metavar="N", help="measure on the first N windows or samples alone")
    parser.add_argument(
        "--prompt", type=int, metavar="N", help="tokens that continuation reads before it decodes (3/4 of a window)"
    )
    parser.add_argument("--passkeys", type=int, default=10, metavar="N", help="passkeys hidden in a sample (10)")
    parser.add_argument("--words", type=int, default=32, metavar="N", help="words in a passkey (32)")
    parser.add_argument(
        "--keys", type=int, default=6, metavar="N", help="most names that a retrieval sample explains (6)"
    )
    parser.add_argument(
        "--questions", type=int, default=3, metavar="N", help="of them asked for, where a kind asks for several (3)"
    )
    parser.add_argument(
        "--kinds",
        default="single,multikey,multiquery,multihop",
        metavar="A,B",
        help="of retrieval: single, multikey (the other keys distract), multiquery, multihop (all)",
    )
    parser.add_argument(
        "--ask", metavar="WHEN", help="decode answers: after the prompt is read, or within it the first question (no)"
    )
    parser.add_argument(
        "--decode", action="store_true", help="perplexity, and answers without --ask, token by token, slowly"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of ruler's and reasoning's samples (0)")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question of lm-eval's and reasoning's tasks"
    )
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="put lm-eval's and reasoning's questions into a chat template",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures there, by position too")


def run(asked: Namespace) -> None:
    """Measure, print a table, and write JSON where that is asked for.

    Raises:
        ValueError: Something about the command line is wrong, or the model.
    """
    from kvtrain.data.passkey import PasskeyTask
    from kvtrain.data.retrieval import RetrievalTask
    from kvtrain.evaluation.evaluate import run_tasks
    from kvtrain.models.parse_method import parse_method

    if asked.json:
        require_file_place(Path(asked.json))
    rows = run_tasks(
        asked.model,
        _names(asked.tasks),
        method=None if asked.method is None else parse_method(asked.method),
        device=asked.device,
        corpus=asked.corpus,
        sequence_length=asked.sequence_length,
        stride=asked.stride,
        limit=asked.limit,
        prompt=asked.prompt,
        ask=asked.ask,
        decode=asked.decode,
        passkeys=PasskeyTask(asked.passkeys, asked.words),
        seed=asked.seed,
        num_fewshot=asked.num_fewshot,
        chat_template=asked.apply_chat_template,
        retrieval=RetrievalTask(asked.keys, asked.questions, dict.fromkeys(_names(asked.kinds), 1.0)),
    )
    if asked.json:
        Path(asked.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for columns, alike in groupby(rows, _columns):  # a table for each kind of row
        print_table(columns, [[cell(row.get(column)) for column in columns] for row in alike])


def _columns(row: dict[str, Any]) -> list[str]:
    """What a table shows of a row."""
    shown = [key for key, value in row.items() if not isinstance(value, list)]
    return [key for key in shown if key not in _JSON_ALONE and not key.endswith("_stderr")]


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]
