"""What a model's cache is made of in vLLM, and the names of classes that say so."""

from collections.abc import Iterator
from enum import Enum

from transformers import PreTrainedConfig

from kvtrain.models.hosts import retrofitted_names
from kvtrain.models.paged_layers import PagedLayer, paged_layers

_END = "ForCausalLM"


class Role(Enum):
    """A word in the names of classes, before ``ForCausalLM``."""

    PAGED = ""  # blocks alone
    HYBRID = "Hybrid"  # blocks, and a state of constant size
    STATE = "State"  # a state alone


def role_of_layers(layers: list[PagedLayer]) -> Role:
    """What layers need; a model of our own has none and keeps a state."""
    if all(layer.num_paged_heads == 0 for layer in layers):
        return Role.STATE
    return Role.HYBRID if any(layer.ring is not None for layer in layers) else Role.PAGED


def role_of(config: PreTrainedConfig) -> Role:
    """What a model needs; one that is not served counts as paged, until somebody asks why it is not."""
    try:
        return role_of_layers(paged_layers(config))
    except ValueError:
        return Role.PAGED


def class_name(retrofitted: str, role: Role) -> str:
    """``KVLlamaHybridForCausalLM`` for ``KVLlamaForCausalLM``."""
    return f"{retrofitted.removesuffix(_END)}{role.value}{_END}"


def class_names() -> Iterator[str]:
    """Names of the classes of all families."""
    return (class_name(name, role) for name in retrofitted_names().values() for role in Role)


def host_and_role(name: str) -> tuple[str, Role] | None:
    """The host's own class and the role behind a name that ``class_names`` has; None for any other."""
    for retrofitted in retrofitted_names().values():
        for role in Role:
            if class_name(retrofitted, role) == name:
                return retrofitted.removeprefix("KV"), role
    return None
