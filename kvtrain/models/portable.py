"""Configurations whose folders open without ``import kvtrain``, where ``trust_remote_code=True`` allows it."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

# Travels in every folder. It imports the installed kvtrain and does nothing else.
SHIM = Path(__file__).with_name("modeling_kvtrain.py")


class PortableConfig(PreTrainedConfig):
    """Saves with itself the file that imports kvtrain, and names it in ``config.json``."""

    @property
    def architecture_name(self) -> str:
        """What the Hub's tags call it."""
        return str(self.model_type)

    def summary(self, size: str) -> str:
        """What a model of this configuration is, in a sentence or two, for its card.

        Args:
            size: Its parameters, in words.
        """
        return f"{self.architecture_name}, {size}."

    @property
    def tasks(self) -> tuple[str, ...]:
        """Heads that a model of this configuration may have, as in ``AutoModelFor<task>``."""
        return ("CausalLM",)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As the base class's, which models call when they are saved; the file goes beside ``config.json``."""
        name = type(self).__name__
        heads = {f"AutoModelFor{task}": f"{name.removesuffix('Config')}For{task}" for task in self.tasks}
        self.auto_map = {auto: f"{SHIM.stem}.{ours}" for auto, ours in {"AutoConfig": name, **heads}.items()}
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        shutil.copyfile(SHIM, Path(save_directory) / SHIM.name)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: transformers would copy this class's own module into folders that are saved later."""
