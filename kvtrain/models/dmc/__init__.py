"""Dynamic Memory Compression: every head learns which tokens to merge into the slot before."""

from kvtrain.models.dmc.config import DMC
from kvtrain.models.registry import MethodArchitecture

ARCHITECTURE = MethodArchitecture(DMC, "kvtrain.models.dmc.build")
__all__ = ["ARCHITECTURE", "DMC"]
