"""DuoAttention: heads that look far keep everything, the others a window with sinks."""

from kvtrain.models.duo.config import Duo
from kvtrain.models.registry import MethodArchitecture

ARCHITECTURE = MethodArchitecture(Duo, "kvtrain.models.duo.build")
__all__ = ["ARCHITECTURE", "Duo"]
