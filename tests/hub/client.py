"""The real client, pointed at another Hub: what it reads from the environment when it is imported, set later."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants, hf_api

from kvtrain.data.hub import why_unreachable

from .server import WRITER, Hub, serve


def settings(address: str, cache: str) -> dict[str, Any]:
    """What HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET come to."""
    return {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": cache,
        "HF_TOKEN_PATH": f"{cache}/no-token",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }


def point_at(address: str, cache: str) -> None:
    """In a process of its own: a program's first line."""
    for name, value in settings(address, cache).items():
        assert hasattr(constants, name)
        setattr(constants, name, value)
    hf_api.api.endpoint = address
    close_session()


@contextmanager
def local_hub(folder: Path, token: str | None = WRITER) -> Iterator[Hub]:
    """A Hub, with this process its client, whoever holds the token."""
    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in settings(hub.address, str(folder / "cache")).items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", hub.address)
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it keeps one
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between a client's attempts
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        if token:
            patch.setenv("HF_TOKEN", token)
        why_unreachable.cache_clear()
        close_session()
        yield hub
    why_unreachable.cache_clear()
    close_session()
