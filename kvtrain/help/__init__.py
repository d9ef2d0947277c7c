"""Pages of ``kvtrain --help``, stored as text so that they are shown at once.

``python -m kvtrain.help`` writes those again that follow from the code; ``fit.txt`` and ``validate.txt`` are
written by hand.
"""

from pathlib import Path

from kvtrain.cli import COMMANDS, build_parser, command_page

FOLDER = Path(__file__).parent


def generated_pages() -> dict[str, str]:
    """Text of every page that follows from the code, by its name."""
    pages = {"kvtrain": command_page()}
    for name, command in COMMANDS.items():
        if command.add_arguments is not None:
            pages[name] = build_parser(name).format_help()
    return pages
