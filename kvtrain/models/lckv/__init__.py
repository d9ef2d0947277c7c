"""Cross-layer sharing of keys and values: LCKV, CLA, YOCO and their kin, on one map."""

from kvtrain.models.lckv.config import LCKV

METHOD = LCKV
__all__ = ["LCKV", "METHOD"]
