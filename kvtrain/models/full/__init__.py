"""The identity method: a plain host on kvtrain's pages and kernels, and the honest baseline."""

from kvtrain.models.full.config import Full
from kvtrain.models.registry import MethodArchitecture

ARCHITECTURE = MethodArchitecture(Full, "kvtrain.models.full.build")
__all__ = ["ARCHITECTURE", "Full"]
