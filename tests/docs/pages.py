"""Pages in Markdown as blocks of code, each with what it says of itself.

A block has a language and may have a title, which readers see above it (```` ```bash title="needs a GPU" ````):

- none: it runs;
- ``needs ...``: it cannot run everywhere, and is read: Python compiles, and a command's options and recipe are parsed;
- ``in PATH``: a part of that file, which compiles and, where there is such a file, stands in it;
- ``until Ctrl-C``: it runs until it is stopped;
- the name of a file: it is that file, in the reader's folder.

Anything else is refused, so that no block is passed over in silence.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from kvtrain.help.notebook import FENCE, HEAD

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LANGUAGES = ("bash", "python", "yaml", "json", "text")
TITLE = re.compile(r"(?P<rule>needs|in) \S.*|until Ctrl-C|[\w-]+(\.\w+)+")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: Where it stands.
        line: Of its first character.
        language: What it is written in.
        title: What it says of itself, or nothing.
        text: Its lines.
    """

    page: Path
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def elsewhere(self) -> bool:
        """Whether it needs what is not here."""
        return self.title.startswith("needs ")

    @property
    def file(self) -> str | None:
        """The file that it is."""
        return self.title if re.fullmatch(r"[\w-]+(\.\w+)+", self.title) else None

    @property
    def part_of(self) -> str | None:
        """The file of which it is a part."""
        return self.title.removeprefix("in ") if self.title.startswith("in ") else None

    def commands(self) -> list[list[str]]:
        """Words of each command, comments and line breaks taken out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks(page: Path) -> list[Block]:
    """Every block of a page, in order.

    Raises:
        ValueError: One says of itself what nobody knows.
    """
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        head = HEAD.fullmatch(match["head"])
        if head is None or head["language"] not in LANGUAGES:
            raise ValueError(f"{page.name}:{line}: a block opens with its language, one of {', '.join(LANGUAGES)}")
        if head["title"] and not TITLE.fullmatch(head["title"]):
            raise ValueError(f"{page.name}:{line}: nobody knows what the title {head['title']!r} says")
        found.append(Block(page, line + 1, head["language"], head["title"] or "", match["text"]))
    return found


def navigation() -> list[str]:
    """Pages of the site, in the order in which they are read."""

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    return pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *(DOCS / name for name in navigation())]
