"""Dynamic Memory Sparsification: heads learn which tokens they do not need once these have left a window."""

from kvtrain.models.dms.config import DMS
from kvtrain.models.registry import MethodArchitecture

ARCHITECTURE = MethodArchitecture(DMS, "kvtrain.models.dms.build")
__all__ = ["ARCHITECTURE", "DMS"]
