"""Training a Hugging Face host with a method in it."""

from abc import abstractmethod
from collections.abc import Collection

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kvtrain.errors import UsageError, first_line
from kvtrain.models.adapters import refuse_adapter
from kvtrain.models.cache_size import cache_bytes, host_kv_bytes
from kvtrain.models.host import retrofit, retrofitted_class, validate_method
from kvtrain.models.hosts import host_adapter, key_value_shapes
from kvtrain.models.method import Method, Repeat
from kvtrain.training.base import Cost, TrainingModule


class MethodModule(TrainingModule):
    """What modules that train a retrofitted host have in common."""

    method: Method
    base_dtype = torch.float32  # of the weights while they train
    _dropped: Collection[int] = ()

    def repeats(self) -> list[Repeat]:
        """See ``TrainingModule``; the method knows."""
        return self.method.repeats(self.host_config())

    def simplify(self, dropped: Collection[int]) -> None:
        """See ``TrainingModule``; of a module that is shallower already, layers are counted as they are left."""
        config = self.host_config()
        depth = config.num_hidden_layers + len(self._dropped)
        left = [layer for layer in range(depth) if layer not in self._dropped]
        self.method = self.method.simplified(dropped, config)
        self._dropped = {*self._dropped, *(left[layer] for layer in dropped)}

    def read_config(self, path: str, remedy: str) -> PreTrainedConfig:
        """As ``read_model_config``, without the layers that are dropped."""
        config = read_model_config(path, remedy)
        return without_layers(config, self._dropped) if self._dropped else config

    @abstractmethod
    def host_config(self) -> PreTrainedConfig:
        """Configuration of the plain host, without touching weights."""

    def plain_config(self) -> PreTrainedConfig:
        """Configuration of the host as it is before a retrofit converts its heads."""
        return self.host_config()

    def check_model(self) -> None:
        """See ``TrainingModule``: a host of a supported family, which the method can work with, and one that trains."""
        name = type(self.method).__name__
        if not self.method.has_parallel_form:
            raise UsageError(
                f"{name} decides while it serves what it keeps, and has nothing to train: train with another method or "
                f"none, and serve what comes out by kvtrain.retrofit(model, kvtrain.{name}(...))"
            )
        config = self.host_config()
        retrofitted_class(config)
        validate_method(self.method, config)

    def require_context_parallel(self, ranks: int) -> None:
        """See ``TrainingModule``; the method must be able to, and heads must divide."""
        config, method = self.host_config(), type(self.method).__name__
        if not self.method.supports_context_parallel:
            raise UsageError(f"{method} needs whole rows and all heads in one place; set context_parallel to 1")
        if any(loss.weight for loss in host_adapter(config).extra_losses(config)):
            raise UsageError("this host's own losses are means over whole batches; set context_parallel to 1")
        for heads, _ in key_value_shapes(config):
            if heads % ranks:
                raise UsageError(
                    f"context_parallel is {ranks}, and the model has {heads} key-value heads; take a number that "
                    "divides them"
                )

    def vocab_size(self) -> int | None:
        """See ``TrainingModule``."""
        return int(self.host_config().vocab_size)

    def build_meta_model(self) -> nn.Module:
        """See ``TrainingModule``."""
        return meta_model(self.host_config(), self.method, self.base_dtype)

    def cost(self, sequence_length: int) -> Cost:
        """See ``TrainingModule``; the cache before is the host's own."""
        config = self.host_config()
        return Cost(
            described=f"with {type(self.method).__name__}",
            layers=self.method.training_cost(config),
            kv_bytes_before=host_kv_bytes(self.plain_config(), sequence_length),
            kv_bytes_after=cache_bytes(config, self.method, sequence_length),
        )


def without_layers(config: PreTrainedConfig, dropped: Collection[int]) -> PreTrainedConfig:
    """A configuration of the same host with fewer layers."""
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in dropped]
    settings = {**config.to_dict(), "num_hidden_layers": len(kept)}
    if settings.get("layer_types"):
        settings["layer_types"] = [settings["layer_types"][layer] for layer in kept]
    return type(config).from_dict(settings)


def read_model_config(path: str, remedy: str) -> PreTrainedConfig:
    """Configuration of a host.

    Args:
        path: File, folder or Hub id.
        remedy: What to do where there is none.

    Raises:
        ValueError: It cannot be had, or says what no model can be.
    """
    refuse_adapter(path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise ValueError(f"no model configuration at {path!r} ({first_line(error)}); {remedy}") from error
    return config


def meta_model(config: PreTrainedConfig, method: Method, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A host with a method in it, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return retrofit(AutoModelForCausalLM.from_config(config, dtype=dtype), method)
