"""Dynamic Memory Sparsification: every head learns which tokens it will not need once they have gone out of a window."""

from kvtrain.models.dms.config import DMS
from kvtrain.models.registry import MethodArchitecture

ARCHITECTURE = MethodArchitecture(DMS, "kvtrain.models.dms.build")
__all__ = ["ARCHITECTURE", "DMS"]
