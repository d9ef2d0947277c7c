"""Registration with transformers' ``Auto*`` classes and tables of names, without importing any model code."""

from types import ModuleType
from typing import Any

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
from kvtrain.models.hosts import retrofitted_names
from kvtrain.models.registry import ModelArchitecture, own_models
from kvtrain.models.stand_in import StandIn, stand_in

_HEADS: dict[str, tuple[Any, dict[str, str]]] = {
    "CausalLM": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "MaskedLM": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "SequenceClassification": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
}
_named: dict[str, Any] = {}  # configurations and stand-ins, as `auto_map` names them


def _retrofitted_class(config: KVTrainConfig) -> Any:
    """The host decides which class it is."""
    from kvtrain.models.host import retrofitted_class

    return retrofitted_class(config.host_config)


def _stand_in(own: ModelArchitecture, head: str) -> type[StandIn]:
    """What stands for one class of a model that has no host."""
    name = f"{own.prefix}For{head}"
    return stand_in(name, own.config, _HEADS[head][0], lambda _: own.head(name))


# Every retrofitted class.
KVTrainForCausalLM = stand_in("KVTrainForCausalLM", KVTrainConfig, AutoModelForCausalLM, _retrofitted_class)


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


def _register_head(head: str, stand_in: type[StandIn], names: dict[str, str]) -> None:
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


def _put_on_transformers(name: str, stand_in: type[StandIn]) -> None:
    """``transformers serve`` and pipelines look for the classes that ``config.json`` names on the module itself."""
    # Its lazy module comes to life again with its processors, and whoever imported it before keeps the first one: put
    # the name on what both have in common.
    lazy = type(transformers)
    setattr(transformers if lazy is ModuleType else lazy, name, stand_in)
