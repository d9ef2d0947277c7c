"""Training a Hugging Face host with a method in it."""

import math
from abc import abstractmethod

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvtrain.cache.base import KVCache
from kvtrain.cache.rows import Placement
from kvtrain.models.host import retrofit
from kvtrain.models.method import Method, key_value_shape
from kvtrain.training.base import KV_DTYPE, Cost, TrainingModule


class MethodModule(TrainingModule):
    """What modules that train a retrofitted host have in common."""

    method: Method

    @abstractmethod
    def host_config(self) -> PreTrainedConfig:
        """Configuration of the plain host, without touching weights."""

    def plain_config(self) -> PreTrainedConfig:
        """Configuration of the host as it is before a retrofit converts its heads."""
        return self.host_config()

    def skeleton(self) -> nn.Module:
        """See ``TrainingModule``."""
        return meta_model(self.host_config(), self.method)

    def cost(self, sequence_length: int) -> Cost:
        """See ``TrainingModule``; the cache before is the host's own."""
        config = self.host_config()
        return Cost(
            described=f"with {type(self.method).__name__}",
            layers=self.method.training_cost(config),
            kv_bytes_before=sequence_length * kv_bytes_per_token(self.plain_config()),
            kv_bytes_after=cache_bytes(config, self.method, sequence_length),
        )


def meta_model(config: PreTrainedConfig, method: Method) -> nn.Module:
    """A host with a method in it, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return retrofit(AutoModelForCausalLM.from_config(config), method)


def kv_bytes_per_token(config: PreTrainedConfig) -> int:
    """Bytes that a full cache holds for one token: keys and values of every layer and key-value head."""
    heads, head_dim = key_value_shape(config)
    return 2 * int(config.num_hidden_layers) * heads * head_dim * KV_DTYPE.itemsize


def cache_bytes(config: PreTrainedConfig, method: Method, tokens: int) -> int:
    """Bytes that a row takes in a method's cache, every head taken to keep the same share of its tokens.

    Args:
        config: The host.
        method: Its ``compression``, where it has one, says how many tokens share a slot.
        tokens: Of the row.
    """
    served = method.as_served(config)
    cache = KVCache(served.cache_layers(config, [Placement(KV_DTYPE)] * config.num_hidden_layers))
    return cache.bytes_for(math.ceil(tokens / getattr(method, "compression", 1.0)), rows=1)
