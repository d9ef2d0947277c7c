"""Where parameters lie and who steps them, one file a strategy; recipes name them by the words registered here."""

from lightning.pytorch.strategies import StrategyRegistry

from kvtrain.training.strategies.deepspeed import DEEPSPEED_INSTALLED, DeepSpeedZeRO, read_config
from kvtrain.training.strategies.fsdp2 import FSDP2

__all__ = ["DEEPSPEED_INSTALLED", "FSDP2", "WORDS", "DeepSpeedZeRO", "read_config"]

_CONFIGS = ("zero2", "zero3", "zero3_offload")
# What a recipe may say in place of a class with its settings.
WORDS = ("fsdp2", *_CONFIGS)

StrategyRegistry.register("fsdp2", FSDP2, description="parameters, gradients and optimizer sharded by torch")
for _word in _CONFIGS:
    StrategyRegistry.register(_word, DeepSpeedZeRO, description="DeepSpeed", config=f"configs/deepspeed/{_word}.json")
