"""A server on a free port of this machine, in a thread, over small models."""

import asyncio
import contextlib
import socket
import threading
import time
from functools import cache

import uvicorn
from openai import OpenAI

from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.inference.engine import Engine, Limits
from kvtrain.inference.server.app import build_app
from kvtrain.inference.server.settings import ServerSettings
from tests.caches import CACHES
from tests.hosts import make_host

BUDGET = 1 << 24
KEY = "a key of many characters"
TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}<|endoftext|>assistant: "
LIMITS = Limits(max_requests=8, step_tokens=64, max_queue=32, max_n=4, max_logprobs=5, max_new_tokens=3000)


@cache
def model_of(method):
    """A model of the packaged tokenizer's vocabulary; served by one engine at a time."""
    entry = CACHES[method]
    return entry.retrofit(make_host(vocab_size=4096, layers=entry.layers))


def tokenizer_with(template=TEMPLATE):
    tokenizer = load_tokenizer("kvtrain:tiny")
    tokenizer.chat_template = template
    return tokenizer


class Served:
    """What a test knows of a server: its address, its engine, its client."""

    def __init__(self, engine, settings, url):
        self.engine, self.settings, self.url = engine, settings, url

    def client(self, key=KEY, **options):
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)


@contextlib.contextmanager
def serve(model, tokenizer, budget=BUDGET, limits=LIMITS, **settings):
    """A server over a model, with a key."""
    engine = Engine(model, tokenizer, budget, limits)
    chosen = ServerSettings(**{"model_name": "small", "keys": (KEY,), **settings})
    config = uvicorn.Config(
        build_app(engine, chosen), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        try:
            until(lambda: server.started)
            yield Served(engine, chosen, url)
        finally:
            engine.close()
            server.should_exit = True
            thread.join(timeout=30)
    assert not thread.is_alive()


def ended(engine):
    """Answers that have ended, as far as the engine's figures know."""
    return sum(count for _, count in engine.stats().finished)


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
