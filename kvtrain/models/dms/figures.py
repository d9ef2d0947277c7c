"""What reports show of DMS: how far it compresses."""

from kvtrain.models.compression_figures import COMPRESSION_FIGURES as FIGURES

__all__ = ["FIGURES"]
