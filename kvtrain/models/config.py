"""One Hugging Face configuration for every retrofitted model: the host's, nested, and the method's."""

import functools
import json
from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from kvtrain.models.method import Method
from kvtrain.models.portable import PortableConfig
from kvtrain.models.registry import method_from_dict

MODEL_TYPE = "kvtrain"
# Where a training checkpoint keeps this configuration, as JSON, for `kvtrain export`.
CHECKPOINT_KEY = "kvtrain_export"


class KVTrainConfig(PortableConfig):
    """Configuration of a host with a method in it; ``model_type`` is ``"kvtrain"``.

    Fields that are not here (``vocab_size``, ``use_cache``, ``num_hidden_layers`` ...) are the host's, read and set.

    Args:
        text_config: The whole host configuration.
        method_config: The method's settings, ``{"name": "dmc", ...}``.
        untrained: Whether ``kvtrain export --method`` has put the method into a host that knows nothing of it.
    """

    model_type = MODEL_TYPE
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    method_config: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    untrained: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            settings = dict(self.text_config)
            self.text_config = AutoConfig.for_model(settings.pop("model_type", "llama"), **settings)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if self.text_config is not None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """As ``PreTrainedConfig`` has it, doing nothing: the host's configuration has read its rotary parameters.

        transformers 5.17 would add one base for all layers to those that layers of each type have.
        """
        return kwargs

    @property
    def host_config(self) -> PreTrainedConfig:
        """The host's configuration.

        Raises:
            ValueError: There is none, as where a plain model's folder was opened.
        """
        if not isinstance(self.text_config, PreTrainedConfig):
            raise ValueError(
                "this configuration names no host (text_config): open a plain model with AutoModelForCausalLM and give "
                "it a method with kvtrain.retrofit"
            )
        return self.text_config

    @property
    def method(self) -> Method:
        """The method's settings.

        Raises:
            ValueError: ``config.json`` names no method that this kvtrain knows.
        """
        return _read_method(json.dumps(self.method_config or {}, sort_keys=True))

    @property
    def architecture_name(self) -> str:
        """See ``PortableConfig``."""
        return self.method.name

    def summary(self, size: str) -> str:
        """See ``PortableConfig``."""
        return f"Host: {self.host_config.model_type}, {size}. Key-value cache: {self.method.described_cache()}."

    def __setattr__(self, name: str, value: Any) -> None:
        host = self.__dict__.get("text_config")
        own = name.startswith("_") or hasattr(type(self), name) or name in {field.name for field in fields(self)}
        if not own and isinstance(host, PreTrainedConfig) and hasattr(host, name):
            setattr(host, name, value)
        else:
            super().__setattr__(name, value)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        host = self.__dict__.get("text_config")
        if name.startswith("__") or not isinstance(host, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(host, name)


@functools.lru_cache(maxsize=64)
def _read_method(settings: str) -> Method:
    """A method from its settings as JSON; configurations are asked for it again and again."""
    return method_from_dict(json.loads(settings))
