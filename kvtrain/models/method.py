"""A method's settings: one frozen dataclass with a few questions answered."""

from abc import ABC
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from kvtrain.models.hosts import key_value_shapes, whole_layers, windows

Repeat = list[tuple[int, ...]]  # groups of layers that come again, alike and in order


def check_kv_bits(kv_bits: int | None) -> None:
    """Refuse bits of a channel in which no cache is kept.

    Raises:
        ValueError: They are none of 8, 4, 2 and None.
    """
    if kv_bits not in (None, 2, 4, 8):
        raise ValueError(f"kv_bits must be 8, 4 or 2, not {kv_bits!r}; leave it out to quantize nothing")


@dataclass(frozen=True)
class Method(ABC):
    """Settings of one way to shrink a key-value cache, and what follows from them alone.

    Subclasses are frozen dataclasses in ``kvtrain/models/<name>/config.py``. What is made of settings, modules and
    caches, is the business of ``build.py`` beside it.
    """

    name: ClassVar[str]
    # Whether attention takes what belongs to heads from those that a rank attends (``HostAttention``).
    supports_context_parallel: ClassVar[bool] = False
    # Whether attention hands what queries see through ``HostAttention.with_sinks``.
    supports_attention_sinks: ClassVar[bool] = False
    # Whether a pass without a cache computes, all tokens at once, what one over a cache does. Methods that decide while
    # they serve have no such form: a pass without a cache then has one of its own, and training is refused.
    has_parallel_form: ClassVar[bool] = True
    # Whether settings say which layers see a window, those of the host included; such layers are its own business then.
    marks_windows: ClassVar[bool] = False

    @property
    def is_host(self) -> bool:
        """Whether a model with these settings is its host, weight for weight and number for number."""
        return False

    @property
    def trains_as_host(self) -> bool:
        """Whether training knows nothing of the cache, so that the host's own class runs the model that was trained."""
        return False

    def described_cache(self) -> str:
        """The cache that serves, in a few words, with its bits where the settings have ``kv_bits``."""
        bits = getattr(self, "kv_bits", None)
        return self.name.upper() if bits is None else f"{self.name.upper()}, {bits} bits a channel"

    def runs_layers_once(self, host_config: PreTrainedConfig) -> bool:
        """Whether a forward pass runs every layer once, so that hidden states between them can be recorded."""
        return True

    def recorded_states(self, host_config: PreTrainedConfig) -> Sequence[int] | None:
        """Layers whose input has a single value, for methods whose stack records hidden states by itself.

        None leaves that to transformers, which sees every layer run once.
        """
        return None

    def training_cost(self, host_config: PreTrainedConfig) -> float:
        """Layers that a training step runs, backward ones counted as two, as a multiple of the plain host's."""
        return 1.0

    def repeats(self, host_config: PreTrainedConfig) -> list[Repeat]:
        """Which groups of layers cost the same: without one of them the model is a smaller one of the same make.

        A host's layers come again, unless they differ in their keys and values; those that slide by themselves.
        """
        if len(set(key_value_shapes(host_config))) > 1:
            return []
        kinds = whole_layers(host_config), windows(host_config)
        return [[(layer,) for layer in kind] for kind in kinds if kind]

    def simplified(self, dropped: Collection[int], host_config: PreTrainedConfig) -> Self:
        """Settings as an estimate rehearses them: what repeats and holds nothing new is done less often.

        Args:
            dropped: Layers that are left out, whole groups of ``repeats``.
            host_config: The host with all its layers.
        """
        return self

    @property
    def survives_reentrant_checkpointing(self) -> bool:
        """Whether layers hand over nothing with a gradient but hidden states; reentrant checkpointing sees no more."""
        return False

    @property
    def servable(self) -> bool:
        """Whether a model with these settings has a cache; without one it runs all the same."""
        return True

    def assisted_options(self) -> dict[str, Any] | None:
        """Options of ``make_cache`` under which it takes tokens back, for assisted decoding; None where none does."""
        return None

    def as_served(self, host_config: PreTrainedConfig) -> "Method":
        """Settings of a model that these train, as far as they decide its cache's size."""
        return self

    def expected_slots(self, tokens: int) -> float:
        """Slots that a head is expected to keep of a row's tokens, as far as settings say; all heads are taken alike.

        Where one of the settings is ``compression``, so many tokens share a slot, and otherwise the cache itself knows.

        Args:
            tokens: Of the row.
        """
        return tokens / float(getattr(self, "compression", 1.0))

    def validate(self, host_config: PreTrainedConfig) -> None:
        """Refuse a host that this method cannot serve.

        Raises:
            ValueError: With the remedy.
        """

    def to_dict(self) -> dict[str, Any]:
        """Settings as they are stored in ``config.json``."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: A field is unknown, most likely because a newer kvtrain wrote the file.
        """
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in settings.items() if key != "name"}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"method {cls.name!r} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}. "
                "A newer kvtrain may have written this checkpoint: update kvtrain"
            )
        return cls(**values)
