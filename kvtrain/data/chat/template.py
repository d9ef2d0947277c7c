"""Chat templates as users give them."""

from pathlib import Path

from kvtrain.errors import UsageError
from kvtrain.recipes import find_config


def read_template(given: str) -> str:
    """A chat template that is given as text, or as a file.

    Args:
        given: Text with ``{{`` or ``{%``, or a path; ``configs/...`` is found in an installed package, too.

    Raises:
        UsageError: There is no such file, or it holds no text.
    """
    if "{{" in given or "{%" in given:
        return given
    try:
        template = Path(find_config(given)).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{given} is no UTF-8 text, so no chat template") from error
    except OSError as error:
        raise UsageError(f"{given}: {error.strerror}; a chat template is given as text, or as its file") from error
    if not template.strip():
        raise UsageError(f"{given} is empty; write a chat template into it, or leave it out")
    return template
