"""A page of ``docs/`` as a notebook: its words as they are, its commands and its Python as cells."""

import json
import re
from collections.abc import Iterator
from typing import Any

FENCE = re.compile(r"^```(?P<head>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
HEAD = re.compile(r'(?P<language>\w+)(?: title="(?P<title>[^"]+)")?')

_BEGIN = (
    "This is the page `{page}` as a notebook. It needs kvtrain in the environment of its kernel, and works in a folder "
    "of its own, `{folder}`."
)


def notebook(markdown: str, page: str, folder: str) -> str:
    """JSON of the notebook, without outputs.

    Blocks with a file's name as their title write that file; other titles say that a block cannot run here, or not to
    its end, and it stays text, as YAML without a name does.

    Args:
        markdown: The page.
        page: What it is called.
        folder: Where the notebook works; made by its first cell.
    """
    begin = [("markdown", _BEGIN.format(page=page, folder=folder)), ("code", _enter(folder))]
    title, _, rest = markdown.partition("\n")
    cells = [("markdown", title), *begin, *_cells(rest)]
    content = {
        "cells": [_cell(number, kind, text) for number, (kind, text) in enumerate(cells, 1)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _enter(folder: str) -> str:
    return f'import os\n\nos.makedirs("{folder}", exist_ok=True)\nos.chdir("{folder}")'


def _cells(markdown: str) -> Iterator[tuple[str, str]]:
    """Kind and text of each; words that follow each other are one."""
    words, end = "", 0
    for match in FENCE.finditer(markdown):
        words += markdown[end : match.start()]
        end = match.end()
        code = _code(match["head"], match["text"])
        if code is None:
            words += match[0]
            continue
        yield from [("markdown", words)] if words.strip() else []
        yield "code", code
        words = ""
    yield from [("markdown", words + markdown[end:])] if (words + markdown[end:]).strip() else []


def _code(head: str, text: str) -> str | None:
    """A block as a cell, or None where it stays text."""
    parts = HEAD.fullmatch(head)
    language, title = (parts["language"], parts["title"]) if parts else ("", None)
    if title:
        return f"%%writefile {title}\n{text}" if re.fullmatch(r"[\w-]+(\.\w+)+", title) else None
    if language == "bash":
        return "\n".join(f"!{line}" for line in text.splitlines() if line)
    return text if language == "python" else None


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    lines = text.strip().splitlines(keepends=True)
    ran: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, **ran, "source": lines}
