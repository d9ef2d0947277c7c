"""The server under Ray Serve: ``launch/serve/ray.yaml`` names ``build``, and every replica has an engine of its own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray import serve

from kvtrain.errors import UsageError
from kvtrain.inference.server.options import API_KEY, ServeOptions, add_engine_arguments
from kvtrain.parser import Parser

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

_PROBES = 8  # requests besides answers that a replica takes: probes of health, figures, pages that watch


def build(options: Mapping[str, Any]) -> "Application":
    """The application, each replica with one model, one budget and the device that Ray gives it.

    Args:
        options: Those of ``kvtrain serve``, by name and without dashes (``max_requests``), but for ``host``, ``port``
            and ``grace``, which are Ray's own business.

    Raises:
        UsageError: An option is unknown or out of range, or there is no key: what reaches Ray's proxy is up to Ray.
    """
    read = _read(options)
    if not read.keys:
        raise UsageError(f"Ray Serve needs a key: {API_KEY} in Ray's environment, or api_key_file on every node")
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="kvtrain",
        max_ongoing_requests=read.asked.max_requests + _PROBES,
        max_queued_requests=read.asked.max_queue,
    )
    return deployment.bind(dict(options))


class Replica:
    """One engine with the application over it.

    Args:
        options: As ``build`` takes them.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = _read(options)
        self._engine = self._options.open_engine()

    def __serve_build_asgi_app__(self) -> "FastAPI":
        """What Ray serves, once the engine stands; Ray asks for it by this name."""
        from kvtrain.inference.server.app import build_app

        return build_app(self._engine, self._options.settings(self._options.asked.max_requests + _PROBES))

    def check_health(self) -> None:
        """Let Ray replace a replica whose engine has died.

        Raises:
            RuntimeError: It has.
        """
        if not (state := self._engine.health()).ok:
            raise RuntimeError(state.reason)

    def __del__(self) -> None:
        """Ray has waited for running requests by now."""
        if engine := getattr(self, "_engine", None):
            engine.close()


def _read(options: Mapping[str, Any]) -> ServeOptions:
    """Options as the command line of ``kvtrain serve`` would have them."""
    parser = Parser("Ray Serve's args")
    add_engine_arguments(parser)
    if "model" not in options:
        raise UsageError("args.model is missing: an exported folder, a Hub id or kvtrain:tiny")
    named = {f"--{name.replace('_', '-')}": str(value) for name, value in options.items() if name != "model"}
    words = [str(options["model"]), *[f"{name}={value}" for name, value in named.items()]]
    return ServeOptions.read(parser.parse_args(words))
