"""Training on from a pretrained host, with any method in it."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvtrain.assets import resolve
from kvtrain.models.full import Full
from kvtrain.models.host import retrofit
from kvtrain.models.method import Method
from kvtrain.recipes import find_config
from kvtrain.training.base import TrainingModule


class RetrofitModule(TrainingModule):
    """Continues the training of a pretrained host with a method in it.

    With ``Full`` it is the control of every retrofit: the same recipe, the method off.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: The method; ``Full`` leaves the host as it is.
        base_config: Configuration file of the base, for estimates where its weights are not at hand.
        **training: See ``TrainingModule``.
    """

    def __init__(
        self, base: str, method: Method | None = None, base_config: str | None = None, **training: Any
    ) -> None:
        super().__init__(**training)
        self.base, self.base_config = base, base_config
        self.method = method or Full()

    def host_config(self) -> PreTrainedConfig:
        """Configuration of the base.

        Raises:
            ValueError: It cannot be had.
        """
        path = find_config(self.base_config) if self.base_config else resolve(self.base)
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as error:  # ValueError: a folder whose config.json names no model type
            raise ValueError(f"no model configuration at {path!r}; set base_config or download the base") from error
        return config

    def build_model(self) -> PreTrainedModel:
        """Load the base in float32 and retrofit it."""
        try:
            host = AutoModelForCausalLM.from_pretrained(resolve(self.base), dtype=torch.float32)
        except OSError as error:
            raise ValueError(f"no model at {self.base!r}; base is a folder, a Hub id or kvtrain:tiny") from error
        return retrofit(host, self.method)
