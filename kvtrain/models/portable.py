"""Configurations whose folders open without ``import kvtrain``, where ``trust_remote_code=True`` allows it."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

# Travels in every folder, with the files beside it that it imports. kvtrain's own imports the installed kvtrain and
# nothing else. Where this very code has travelled in a folder, it is that folder's, with all the code that lies there.
SHIM = Path(__file__).with_name("modeling_kvtrain.py")


class PortableConfig(PreTrainedConfig):
    """Saves with itself the code that opens its folder, and names it in ``config.json``."""

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

    @property
    def auto_classes(self) -> dict[str, str]:
        """``auto_map`` of ``config.json``: what opens the folder, by the ``Auto*`` class that is asked to."""
        name = type(self).__name__
        heads = {f"AutoModelFor{task}": f"{name.removesuffix('Config')}For{task}" for task in self.tasks}
        return {auto: f"{SHIM.stem}.{ours}" for auto, ours in {"AutoConfig": name, **heads}.items()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As the base class's, which models call when they are saved; the code goes beside ``config.json``."""
        self.auto_map = self.auto_classes
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        for file in {SHIM, *map(Path, get_relative_import_files(SHIM))}:
            shutil.copyfile(file, Path(save_directory) / file.name)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: transformers would copy this class's own module into folders that are saved later."""
