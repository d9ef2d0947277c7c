"""Pages of ``kvtrain --help``, stored as text to be shown at once, and those of ``docs/`` that follow from code.

``python -m kvtrain.help`` writes all of it again; ``fit.txt`` and ``validate.txt`` are written by hand.
"""

from pathlib import Path

from kvtrain.cli import COMMANDS, build_parser, command_page

FOLDER = Path(__file__).parent
DOCS = FOLDER.parents[1] / "docs"  # of a checkout
PAGE = "retrofit.md"  # which is a notebook, too


def generated_pages() -> dict[str, str]:
    """Text of every page that follows from the code, by its name."""
    pages = {"kvtrain": command_page()}
    for name, command in COMMANDS.items():
        if command.add_arguments is not None:
            pages[name] = build_parser(name).format_help()
    return pages


def command_pages() -> dict[str, str]:
    """Text of every page by its name, in the order of ``kvtrain --help``, those that are written by hand among them."""
    generated = generated_pages()
    names = ("kvtrain", *COMMANDS)
    return {name: generated.get(name) or (FOLDER / f"{name}.txt").read_text() for name in names}


def documents() -> dict[str, str]:
    """Text of every file below ``docs/`` that follows from the code, or from a page, by its path there."""
    from kvtrain.help.notebook import notebook
    from kvtrain.help.reference import reference_pages

    reference = {f"reference/{name}": text for name, text in reference_pages(command_pages()).items()}
    road = notebook((DOCS / PAGE).read_text(encoding="utf-8"), f"docs/{PAGE}", "retrofit_my_model")
    return {**reference, "retrofit_your_model.ipynb": road}
