"""TransNormer (Qin et al., arXiv 2210.10340): linear attention under a norm, attention within blocks below it."""

from kvtrain.models.registry import ModelArchitecture
from kvtrain.models.transnormer.config import TransNormerConfig

_TASKS = ("CausalLM", "MaskedLM", "SequenceClassification")
ARCHITECTURE = ModelArchitecture(TransNormerConfig, "kvtrain.models.transnormer.heads", "TransNormer", _TASKS)
