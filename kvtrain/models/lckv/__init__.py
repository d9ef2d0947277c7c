"""Cross-layer sharing of keys and values: LCKV, CLA, YOCO and their kin, on one map."""

from kvtrain.models.lckv.config import LCKV
from kvtrain.models.registry import MethodArchitecture

ARCHITECTURE = MethodArchitecture(LCKV, "kvtrain.models.lckv.build")
__all__ = ["ARCHITECTURE", "LCKV"]
