"""One engine for every checkpoint: requests come and go while one thread owns the model and its matching cache."""

from kvtrain.inference.engine.answers import Ticket
from kvtrain.inference.engine.engine import Engine, EventStream
from kvtrain.inference.engine.limits import Limits
from kvtrain.inference.engine.request import (
    Completion,
    Delta,
    EngineClosedError,
    Event,
    Finish,
    FinishReason,
    QueueFullError,
    Request,
    Sampling,
    TokenLogprob,
    TooLargeError,
    Usage,
)
from kvtrain.inference.engine.stats import EngineStats, Health

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineClosedError",
    "EngineStats",
    "Event",
    "EventStream",
    "Finish",
    "FinishReason",
    "Health",
    "Limits",
    "QueueFullError",
    "Request",
    "Sampling",
    "Ticket",
    "TokenLogprob",
    "TooLargeError",
    "Usage",
]
