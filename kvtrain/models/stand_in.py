"""Stands for a model class with an ``Auto*`` class, so that modelling code is imported when a model is opened."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StandIn:
    """What ``Auto*`` classes are given in a class's place; ``stand_in`` makes them."""

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


def stand_in(name: str, config: type[PreTrainedConfig], auto: Any, choose: Callable[[Any], Any]) -> type[StandIn]:
    """What stands for one class, or for all that share a kind of configuration.

    Args:
        name: What it is called; ``auto_map`` names it so.
        config: The class of their configurations.
        auto: The ``Auto*`` class that opens them.
        choose: The model class for a configuration.
    """
    return type(name, (StandIn,), {"config_class": config, "auto_class": auto, "_class": staticmethod(choose)})
