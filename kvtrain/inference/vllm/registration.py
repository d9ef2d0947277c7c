"""Names under which vLLM finds our models, and the configuration that says which of them a folder needs."""

from typing import Any

from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig, VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from kvtrain.inference.vllm.preparation import prepare
from kvtrain.inference.vllm.roles import Role, class_name, class_names, role_of
from kvtrain.models.config import MODEL_TYPE, KVTrainConfig
from kvtrain.models.registry import own_models


class ServedConfig(KVTrainConfig):
    """Names a class by what its cache is made of: vLLM asks classes, and not models, whether they keep a state."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.text_config is not None and self.architectures:
            self.architectures = [class_name(self.architectures[0], role_of(self))]

    @property
    def layer_types(self) -> list[str] | None:
        """The host's; of a hybrid other words, or vLLM concludes from the host's that it keeps no state."""
        host: list[str] | None = getattr(self.text_config, "layer_types", None)
        return host if host is None or role_of(self) is not Role.HYBRID else ["hybrid"] * len(host)


class Front(VerifyAndUpdateConfig):
    """Runs in the process that users look at, before any weight is read: what it refuses is the last thing said."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """See ``preparation.prepare``; called once vLLM knows its whole configuration."""
        prepare(vllm_config)
        if vllm_config.model_config.is_attention_free:
            MambaModelConfig.verify_and_update_config(vllm_config)


class OwnLength(ModelArchConfigConvertorBase):
    """The longest text of a model of our own, where nobody asks for another; ``model_max_length`` is what one may ask.

    vLLM would take that for the default, too, and set aside token ids for it in every row.
    """

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        """See vLLM's."""
        key = "max_position_embeddings"
        return float(getattr(self.hf_text_config, key)), key


def register_all() -> None:
    """Register the configuration, and for every class its file, so that vLLM imports what it needs alone."""
    AutoConfig.register(MODEL_TYPE, ServedConfig, exist_ok=True)
    classes = dict.fromkeys(class_names(), "hosts")
    classes |= {name: "own_models" for own in own_models() for name in own.heads}
    for name, file in classes.items():
        attribute = name if file == "hosts" else "OwnModel"
        ModelRegistry.register_model(name, f"kvtrain.inference.vllm.{file}:{attribute}")
        MODELS_CONFIG_MAP[name] = Front
    for own in own_models():
        MODEL_ARCH_CONFIG_CONVERTORS[own.config.model_type] = OwnLength
