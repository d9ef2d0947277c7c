"""The identity method: a plain host on kvtrain's pages and kernels, and the honest baseline."""

from kvtrain.models.full.config import Full

METHOD = Full
__all__ = ["METHOD", "Full"]
