"""Training a host from nothing, with any method in it: how the packaged base model was made."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvtrain.models.full import Full
from kvtrain.models.host import retrofit
from kvtrain.models.method import Method
from kvtrain.recipes import find_config
from kvtrain.training.method_module import MethodModule


class PretrainModule(MethodModule):
    """Pretrains a host.

    Args:
        model_config: HF configuration file of the host, such as ``configs/models/tiny_llama.json``.
        method: The method in it; ``Full``, ordinary attention, where absent.
        **training: See ``TrainingModule``.
    """

    def __init__(self, model_config: str, method: Method | None = None, **training: Any) -> None:
        super().__init__(**training)
        self.model_config = model_config
        self.method = method or Full()

    def host_config(self) -> PreTrainedConfig:
        """Configuration of the host.

        Raises:
            ValueError: The file is not there.
        """
        return self.read_config(find_config(self.model_config), "model_config is a file such as a host's config.json")

    def build_model(self) -> PreTrainedModel:
        """A host with random weights that depend on the seed alone."""
        config = self.host_config()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            host = AutoModelForCausalLM.from_config(config)
        return retrofit(host, self.method)
