"""Dynamic Memory Compression: every head learns which tokens to merge into the slot before."""

from kvtrain.models.dmc.config import DMC

METHOD = DMC
__all__ = ["DMC", "METHOD"]
