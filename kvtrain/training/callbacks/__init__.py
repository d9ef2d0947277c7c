"""Callbacks, one concern each."""

from kvtrain.training.callbacks.progress import TokenProgress
from kvtrain.training.callbacks.seeding import StepSeeding
from kvtrain.training.callbacks.throughput import Throughput

__all__ = ["StepSeeding", "Throughput", "TokenProgress"]
