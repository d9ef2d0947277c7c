"""``kvtrain push``, and what ``kvtrain export`` shares with it."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from kvtrain.parser import Parser

if TYPE_CHECKING:
    from kvtrain.export.push import PushTarget


def add_arguments(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="FOLDER", help="what kvtrain export has written")
    parser.add_argument("push_to", metavar="ORG/NAME", help="Hub repository; made if it is not there")
    add_target_arguments(parser)
    parser.epilog = (
        "All files arrive in one commit or none does, and what the Hub holds already is not sent again. The token is "
        "that of `hf auth login`, or HF_TOKEN in the environment."
    )


def run(asked: Namespace) -> None:
    """Push a folder that is there.

    Raises:
        ValueError: Something about the command line is wrong, the folder, or the Hub.
    """
    push(Path(asked.folder), read_target(asked))


def add_target_arguments(parser: Parser) -> None:
    """Declare the options that say more about where to push."""
    parser.add_argument("--private", action="store_true", help="make a new Hub repository private")
    parser.add_argument("--revision", metavar="B", help="branch to push to; made if it is not there (main)")


def read_target(asked: Namespace) -> "PushTarget":
    """Where to push.

    Raises:
        ValueError: The Hub takes no such names.
    """
    from kvtrain.export.push import PushTarget

    return PushTarget(asked.push_to, asked.revision or "main", asked.private)


def push(folder: Path, target: "PushTarget") -> None:
    """Push, and print the commit.

    Raises:
        ValueError: See ``push_folder``.
    """
    from kvtrain.export.push import push_folder

    pushed = push_folder(folder, target)
    outcome = f"pushed in commit {pushed.commit}" if pushed.changed else f"there already, in commit {pushed.commit}"
    print(f"{target}: {outcome}")
