"""DuoAttention: heads that look far keep everything, the others a window with sinks."""

from kvtrain.models.duo.config import Duo

METHOD = Duo
__all__ = ["METHOD", "Duo"]
