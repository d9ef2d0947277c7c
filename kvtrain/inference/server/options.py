"""What a server is asked for, on the command line or in a file of Ray Serve: options, and the engine that they mean."""

import importlib.util
import os
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvtrain.errors import UsageError, require_at_least
from kvtrain.parser import Parser, add_device_argument, add_method_argument, finite, num_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from kvtrain.inference.engine import Engine
    from kvtrain.inference.server.settings import ServerSettings
    from kvtrain.models.method import Method

API_KEY = "KVTRAIN_API_KEY"
_PACKAGES = ("fastapi", "uvicorn", "openai", "prometheus_client")
_SHORTEST_KEY = 16


def add_engine_arguments(parser: Parser) -> None:
    """Declare what does not depend on where a server listens."""
    parser.add_argument("model", metavar="MODEL", help="exported folder, Hub id or kvtrain:tiny")
    add_method_argument(parser)
    add_device_argument(parser)
    parser.add_argument("--name", help="what requests call the model (MODEL, of a folder its last part)")
    parser.add_argument(
        "--budget", type=num_bytes, default=num_bytes("1GiB"), metavar="SIZE", help="bytes of cache (1GiB)"
    )
    parser.add_argument("--max-requests", type=int, default=64, metavar="N", help="answers written at a time (64)")
    parser.add_argument("--max-queue", type=int, default=1024, metavar="N", help="answers that may wait (1024)")
    parser.add_argument("--max-prompt-tokens", type=int, default=32768, metavar="N", help="of a request (32768)")
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="of an answer (4096)")
    parser.add_argument("--timeout", type=finite, default=600.0, metavar="S", help="seconds for an answer (600)")
    parser.add_argument("--page-size", type=int, metavar="N", help="slots in a page of the cache (the method's)")
    parser.add_argument("--api-key-file", metavar="FILE", help="keys that open the server, one a line")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja template in place of the tokenizer's")


@dataclass(frozen=True)
class ServeOptions:
    """What was asked for, looked over and read, and what it means.

    Attributes:
        asked: Options by name.
        keys: Any of them opens the server.
        template: For chats, in place of the tokenizer's.
        method: For a plain model.
    """

    asked: Namespace
    keys: tuple[str, ...] = field(repr=False)
    template: str | None
    method: "Method | None"

    @classmethod
    def read(cls, asked: Namespace) -> "ServeOptions":
        """Say what is wrong before anything heavy is loaded.

        Raises:
            UsageError: A package is missing, a number is out of range, or a file does not hold what it should.
            OSError: A file cannot be read.
        """
        from kvtrain.data.chat.template import read_template

        _check(asked)
        keys = _read_keys(asked.api_key_file)
        template = None if asked.chat_template is None else read_template(asked.chat_template)
        return cls(asked, keys, template, _read_method(asked.method))

    def open_engine(self) -> "Engine":
        """Read the model and start its engine.

        Raises:
            UsageError: There is no such model, it generates no text, or the template does not work.
        """
        from kvtrain.inference.device import pick_device
        from kvtrain.inference.engine import Engine, Limits
        from kvtrain.inference.load import open_model

        asked = self.asked
        model, tokenizer = open_model(asked.model, method=self.method, device=pick_device(asked.device))
        if self.template is not None:
            _set_template(tokenizer, self.template, asked.chat_template)
        limits = Limits(
            max_requests=asked.max_requests,
            max_queue=asked.max_queue,
            max_prompt_tokens=asked.max_prompt_tokens,
            max_new_tokens=asked.max_tokens,
            step_tokens=max(512, 2 * asked.max_requests),
            page_size=asked.page_size,
        )
        return Engine(model, tokenizer, asked.budget, limits)

    def settings(self, max_connections: int, allowed_hosts: frozenset[str] | None = None) -> "ServerSettings":
        """Settings of the server, which also depend on where it listens."""
        from kvtrain.inference.server.settings import ServerSettings

        folder = Path(self.asked.model)
        name = self.asked.name or (folder.resolve().name if folder.is_dir() else self.asked.model)
        return ServerSettings(
            name, self.keys, allowed_hosts, max_connections=max_connections, request_timeout=self.asked.timeout
        )


def _check(asked: Namespace) -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serving needs {', '.join(missing)}; pip install 'kvtrain[serve]'")
    for name in ("max_requests", "max_queue", "max_prompt_tokens", "max_tokens", "page_size"):
        require_at_least(1, f"--{name.replace('_', '-')}", getattr(asked, name))
    if asked.timeout <= 0:
        raise UsageError(f"--timeout must be above 0, not {asked.timeout}")


def _read_keys(path: str | None) -> tuple[str, ...]:
    """Keys of a file, or of the environment; never shown, in no message either."""
    given = os.environ.get(API_KEY, "") if path is None else Path(path).read_bytes().decode("utf-8", "replace")
    keys = tuple(line.strip() for line in given.splitlines() if line.strip())
    where = API_KEY if path is None else path
    if path is not None and not keys:
        raise UsageError(f"{where} holds no key; write one a line")
    if any(len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() for key in keys):
        raise UsageError(
            f"{where}: a key must have at least {_SHORTEST_KEY} ASCII characters; `openssl rand -hex 32` makes one"
        )
    return keys


def _read_method(text: str | None) -> "Method | None":
    from kvtrain.models.parse_method import parse_method

    return None if text is None else parse_method(text)


def _set_template(tokenizer: "PreTrainedTokenizerFast", template: str, path: str) -> None:
    """Give a tokenizer a chat template, once it has been tried."""
    from jinja2 import TemplateError

    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UsageError(f"{path} is no chat template that works: {' '.join(str(error).split())}") from error
