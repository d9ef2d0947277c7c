"""Attention sinks and a sliding window in every head."""

from kvtrain.models.registry import MethodArchitecture
from kvtrain.models.window.config import Window

ARCHITECTURE = MethodArchitecture(Window, "kvtrain.models.window.build")
