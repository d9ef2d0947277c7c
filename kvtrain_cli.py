"""The ``kvtrain`` command: pages of help from text files at once, everything else from ``kvtrain.cli``.

This module lies beside the package, not in it, because importing ``kvtrain`` registers its models with
transformers, and a page of help should not wait for that.
"""

import importlib.util
import re
import sys
from pathlib import Path

HELP_FLAGS = ("-h", "--help")
VERSION_FLAGS = ("-V", "--version")


def package_folder() -> Path:
    """Where the ``kvtrain`` package lies, found without importing it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec("kvtrain")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the package kvtrain is not installed")
    return Path(spec.origin).parent


def version() -> str:
    """The version that ``kvtrain.__version__`` holds, read from the source."""
    source = (package_folder() / "__init__.py").read_text()
    match = re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE)
    return match.group(1) if match else "unknown"


def help_page(name: str) -> str | None:
    """The stored page of a command, or of ``kvtrain`` itself; None where there is none."""
    path = package_folder() / "help" / f"{name}.txt"
    return path.read_text() if name.isalpha() and path.is_file() else None


def quick_answer(arguments: list[str]) -> str | None:
    """What can be said without importing anything heavy, or None.

    Args:
        arguments: The command line after ``kvtrain``.
    """
    if not arguments or arguments[0] in HELP_FLAGS:
        return help_page("kvtrain")
    if arguments[0] in VERSION_FLAGS:
        return f"kvtrain {version()}\n"
    if any(flag in arguments[1:] for flag in HELP_FLAGS):
        return help_page(arguments[0])
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    answer = quick_answer(arguments)
    if answer is None:
        from kvtrain.cli import main as run

        return run(arguments)
    print(answer, end="")
    return 0 if arguments else 2


if __name__ == "__main__":
    raise SystemExit(main())
