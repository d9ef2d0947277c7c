"""Hybrids: some layers of a host attend linearly, over a state of constant size, the others by softmax."""

from kvtrain.models.hybrid.config import Hybrid
from kvtrain.models.registry import MethodArchitecture

ARCHITECTURE = MethodArchitecture(Hybrid, "kvtrain.models.hybrid.build")
__all__ = ["ARCHITECTURE", "Hybrid"]
