"""One page that needs no other file: a table, and figures as pictures in it."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

_DPI = 150

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: {width}px; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; }}
table {{ border-collapse: collapse; margin-bottom: 1.5rem; }}
th, td {{ padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid #ddd; text-align: left; font-weight: normal; }}
td {{ font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }}
th:last-child, td:last-child {{ padding-right: 0; }}
img {{ width: 100%; margin-bottom: 1.5rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{before}
{pictures}
{after}
</body>
</html>
"""


def write_page(
    folder: Path,
    page: str,
    title: str,
    figures: Mapping[str, Figure],
    *,
    before: str = "",
    after: str = "",
    width: int = 760,
) -> list[Path]:
    """Write figures as PNGs, and a page that holds them all.

    Args:
        folder: Where they go; made where it is not there.
        page: Name of its file.
        title: May hold any character.
        figures: By the name of their file.
        before: HTML above the pictures, such as ``facts_table`` gives.
        after: HTML below them, such as ``wide_table`` gives.
        width: Of the page at most, in pixels.

    Returns:
        The files written: one PNG a figure, then the page.
    """
    pictures = {name: png(figure) for name, figure in figures.items()}
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.png" for name in pictures]
    for path, data in zip(written, pictures.values(), strict=True):
        path.write_bytes(data)
    (folder / page).write_text(_render(title, pictures, before=before, after=after, width=str(width)), encoding="utf-8")
    return [*written, folder / page]


def png(figure: Figure) -> bytes:
    """A figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def facts_table(facts: Mapping[str, str]) -> str:
    """Names and their values as HTML."""
    lines = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items()]
    return "\n".join(["<table>", *lines, "</table>"])


def wide_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> str:
    """A title, a note, and rows below headings, as HTML; the first cell of each names it."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = []
    for name, *cells in rows:
        values = "".join(f"<td>{html.escape(value)}</td>" for value in cells)
        lines.append(f"<tr><th>{html.escape(name)}</th>{values}</tr>")
    above = [f"<h2>{html.escape(title)}</h2>", f"<p>{html.escape(note)}</p>"]
    return "\n".join([*above, "<table>", f"<tr>{head}</tr>", *lines, "</table>"])


def _render(title: str, pictures: Mapping[str, bytes], **parts: str) -> str:
    images = [
        f'<img alt="{html.escape(name.replace("_", " "))}"'
        f' src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
    ]
    return _TEMPLATE.format(title=html.escape(title), pictures="\n".join(images), **parts)
