"""Registration with transformers' ``Auto*`` classes, without importing any model code."""

from typing import TYPE_CHECKING, Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from kvtrain.models.config import KVTrainConfig
from kvtrain.models.registry import OwnModel, own_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEADS: dict[str, Any] = {
    "CausalLM": AutoModelForCausalLM,
    "MaskedLM": AutoModelForMaskedLM,
    "SequenceClassification": AutoModelForSequenceClassification,
}


class _StandIn:
    """Stands for a model class with an ``Auto*`` class, so that ``import kvtrain`` stays free of modelling code."""

    config_class: ClassVar[type[PreTrainedConfig]]

    @staticmethod
    def _class(config: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: Any = None, **kwargs: Any) -> "PreTrainedModel":
        """Load a folder or Hub repository; the arguments are those of ``PreTrainedModel.from_pretrained``."""
        if config is None:
            config = cls.config_class.from_pretrained(path)
        model: PreTrainedModel = cls._class(config).from_pretrained(path, *args, config=config, **kwargs)
        return model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> "PreTrainedModel":
        model: PreTrainedModel = cls._class(config)._from_config(config, **kwargs)
        return model


class KVTrainForCausalLM(_StandIn):
    """Every retrofitted class: the host decides which one it is."""

    config_class = KVTrainConfig

    @staticmethod
    def _class(config: KVTrainConfig) -> Any:
        from kvtrain.models.host import retrofitted_class

        return retrofitted_class(config.host_config)


def _stand_in(own: OwnModel, name: str) -> type[_StandIn]:
    """What stands for one class of a model that has no host."""
    return type(name, (_StandIn,), {"config_class": own.config, "_class": staticmethod(lambda _: own.head(name))})


def register() -> None:
    """Make the ``Auto*`` classes know the ``model_type`` of every model here."""
    AutoConfig.register(KVTrainConfig.model_type, KVTrainConfig, exist_ok=True)
    AutoModelForCausalLM.register(KVTrainConfig, KVTrainForCausalLM, exist_ok=True)
    for own in own_models():
        AutoConfig.register(own.config.model_type, own.config, exist_ok=True)
        for head, auto in _HEADS.items():
            auto.register(own.config, _stand_in(own, f"{own.prefix}For{head}"), exist_ok=True)
