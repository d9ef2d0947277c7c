"""Registration with transformers' ``Auto*`` classes and tables of names, without importing any model code."""

from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from kvtrain.models.config import KVTrainConfig
from kvtrain.models.families import retrofitted_names
from kvtrain.models.registry import ModelArchitecture, own_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEADS: dict[str, tuple[Any, dict[str, str]]] = {
    "CausalLM": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "MaskedLM": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "SequenceClassification": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
}
_named: dict[str, Any] = {}  # configurations and stand-ins, as `auto_map` names them


class _StandIn:
    """Stands for a model class with an ``Auto*`` class, so that ``import kvtrain`` stays free of modelling code."""

    config_class: ClassVar[type[PreTrainedConfig]]
    auto_class: ClassVar[Any]

    @staticmethod
    def _class(config: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: Any = None, **kwargs: Any) -> "PreTrainedModel":
        """Load a folder or Hub repository; the arguments are those of ``PreTrainedModel.from_pretrained``."""
        # Without a configuration the Auto class reads it, and comes back here: it knows what goes to the Hub.
        chosen = cls.auto_class if config is None else cls._class(config)
        model: PreTrainedModel = chosen.from_pretrained(path, *args, config=config, **kwargs)
        return model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> "PreTrainedModel":
        model: PreTrainedModel = cls._class(config)._from_config(config, **kwargs)
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: a folder says by itself how it is opened."""


class KVTrainForCausalLM(_StandIn):
    """Every retrofitted class: the host decides which one it is."""

    config_class = KVTrainConfig
    auto_class = AutoModelForCausalLM

    @staticmethod
    def _class(config: KVTrainConfig) -> Any:
        from kvtrain.models.host import retrofitted_class

        return retrofitted_class(config.host_config)


def _stand_in(own: ModelArchitecture, head: str) -> type[_StandIn]:
    """What stands for one class of a model that has no host."""
    name, auto = f"{own.prefix}For{head}", _HEADS[head][0]
    chosen = staticmethod(lambda _: own.head(name))
    return type(name, (_StandIn,), {"config_class": own.config, "auto_class": auto, "_class": chosen})


def class_by_name(name: str) -> Any:
    """What ``auto_map`` of a saved ``config.json`` means by a name, for the file that travels with it.

    Raises:
        AttributeError: This kvtrain has no such class.
    """
    if name not in _named:
        raise AttributeError(f"this kvtrain has no {name}; update kvtrain")
    return _named[name]


def register() -> None:
    """Make transformers know every model here: its configuration, its classes, and their names."""
    _register_config(KVTrainConfig)
    retrofitted = {f"{KVTrainConfig.model_type}-{host}": name for host, name in retrofitted_names().items()}
    _register_head("CausalLM", KVTrainForCausalLM, retrofitted)
    for own in own_models():
        _register_config(own.config)
        for head in own.tasks:
            _register_head(head, _stand_in(own, head), {})


def _register_config(config: type[PreTrainedConfig]) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    _named[config.__name__] = config


def _register_head(head: str, stand_in: type[_StandIn], names: dict[str, str]) -> None:
    """Register what stands for one class, or for all of those whose names are given."""
    config, auto = stand_in.config_class, stand_in.auto_class
    auto.register(config, stand_in, exist_ok=True)
    _named[stand_in.__name__] = stand_in
    names = {config.model_type: stand_in.__name__, **names}
    # Trainer, pipelines and lm-eval look up names in this table; keys of which transformers knows no configuration
    # are skipped where it looks for classes.
    _HEADS[head][1].update(names)
    for name in names.values():
        _put_on_transformers(name, stand_in)


def _put_on_transformers(name: str, stand_in: type[_StandIn]) -> None:
    """``transformers serve`` and pipelines look for the classes that ``config.json`` names on the module itself."""
    # Its lazy module comes to life again with its processors, and whoever imported it before keeps the first one: put
    # the name on what both have in common.
    lazy = type(transformers)
    setattr(transformers if lazy is ModuleType else lazy, name, stand_in)
