"""Registration with transformers' ``Auto*`` classes, without importing any model code."""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM

from kvtrain.models.config import MODEL_TYPE, KVTrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class KVTrainForCausalLM:
    """Stands for every retrofitted class with ``AutoModelForCausalLM``: the host decides which one it is.

    One light class instead of one for each host keeps ``import kvtrain`` free of modelling code.
    """

    config_class = KVTrainConfig

    @staticmethod
    def _class(config: KVTrainConfig) -> Any:
        from kvtrain.models.host import retrofitted_class

        return retrofitted_class(config.host_config)

    @classmethod
    def from_pretrained(
        cls, path: str, *args: Any, config: KVTrainConfig | None = None, **kwargs: Any
    ) -> "PreTrainedModel":
        """Load a folder or Hub repository; the arguments are those of ``PreTrainedModel.from_pretrained``."""
        if config is None:
            config = KVTrainConfig.from_pretrained(path)
        model: PreTrainedModel = cls._class(config).from_pretrained(path, *args, config=config, **kwargs)
        return model

    @classmethod
    def _from_config(cls, config: KVTrainConfig, **kwargs: Any) -> "PreTrainedModel":
        model: PreTrainedModel = cls._class(config)._from_config(config, **kwargs)
        return model


def register() -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know ``model_type: "kvtrain"``."""
    AutoConfig.register(MODEL_TYPE, KVTrainConfig, exist_ok=True)
    AutoModelForCausalLM.register(KVTrainConfig, KVTrainForCausalLM, exist_ok=True)
