"""Tensors in, a scalar out."""
