"""What is learned, shown: on a terminal, without colors, and as a page."""

import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtrain.data.chat.picture import SAMPLES_PAGE, samples
from kvtrain.data.picture import Piece, terminal_text
from kvtrain.data.shards import TokenShards
from kvtrain_cli import main

CHATS = [("What is <b>é 👩‍🚀</b>?", "An astronaut 👩‍🚀, é."), ("a", "b\nc"), ("d", "e"), ("f", "g")]
TEMPLATE = "configs/chat_templates/plain.jinja"


@pytest.fixture
def prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """A prepared folder, and what the command printed."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": ask, "completion": say}) + "\n" for ask, say in CHATS))
    options = ["--tokenizer", "kvtrain:tiny", "--chat-template", TEMPLATE, "--output", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["prepare", "--chats", str(path), *options]) == 0
    return tmp_path / "out", capsys.readouterr().out


def test_the_command_shows_three_samples(prepared: tuple[Path, str]):
    folder, printed = prepared
    samples_shown = printed.split("--- sample ")[1:]
    assert len(samples_shown) == 3
    for number, (shown, (ask, say)) in enumerate(zip(samples_shown, CHATS, strict=False), 1):
        text = f"### user\n{ask}<|endoftext|>\n### assistant\n⟦{say}<|endoftext|>⟧"
        assert shown.startswith(f"{number}, what is learned between ⟦ and ⟧ ---\n{text}\n")
    shards = TokenShards(folder)
    tokens, learned = shards.manifest.num_tokens, sum(int(targets.sum()) for targets in shards.targets)
    assert printed.splitlines()[-2] == f"{folder}: 4 chats, 4 answers, {tokens:,} tokens, {learned:,} of them learned"
    assert printed.splitlines()[-1].endswith(str(folder / SAMPLES_PAGE))


def test_the_page_holds_every_token(prepared: tuple[Path, str], tokenizer: Any):
    """Characters of several tokens are in one piece; what is learned is marked; nothing is taken for markup."""
    folder, _ = prepared
    page = (folder / SAMPLES_PAGE).read_text()
    blocks = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert len(blocks) == 3
    for block, (ask, say) in zip(blocks, CHATS, strict=False):
        spans = re.findall(r'<span(| class="learned")>(.*?)</span>', block, re.DOTALL)
        text = "".join(html.unescape(words) for _, words in spans).replace("↵\n", "\n")
        assert text == f"### user\n{ask}<|endoftext|>\n### assistant\n{say}<|endoftext|>\n"
        assert (
            "".join(html.unescape(words) for kind, words in spans if kind).replace("↵\n", "\n") == f"{say}<|endoftext|>"
        )
    assert "<b>" not in page and "\ufffd" not in page
    assert "http" not in page  # it stands alone
    assert [len(samples(TokenShards(folder), tokenizer, count)) for count in (1, 4, 9)] == [1, 4, 4]


def test_samples_come_from_all_shards(prepared: tuple[Path, str], tokenizer: Any):
    shards = TokenShards(prepared[0])
    twice = TokenShards(prepared[0])
    for parts in (twice.tokens, twice.starts, twice.targets):
        parts *= 2
    assert samples(twice, tokenizer, 6) == [*samples(shards, tokenizer, 4), *samples(shards, tokenizer, 2)]


def test_colors_and_marks():
    sample = [Piece("ask", False), Piece("say ", True), Piece("more", True), Piece("\n", False)]
    assert terminal_text(sample, colors=False) == "ask⟦say more⟧\n"
    assert terminal_text(sample, colors=True) == "ask\x1b[32;1msay more\x1b[0m\n"
    long = [Piece("a" * 1000, False), Piece("b" * 1000, True), Piece("c", False)]
    assert terminal_text(long, colors=False, rest=" (there)") == "a" * 1000 + "⟦" + "b" * 500 + "⟧ … (there)"


def test_a_terminal_gets_colors(prepared: tuple[Path, str], tokenizer: Any, monkeypatch: Any, capsys: Any):
    from kvtrain.data.chat.picture import print_samples

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_samples(prepared[0], tokenizer)
    printed = capsys.readouterr().out
    assert "what is learned in green" in printed and "\x1b[32;1me<|endoftext|>\x1b[0m" in printed
