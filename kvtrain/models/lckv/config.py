"""Settings of cross-layer sharing: LCKV (Wu and Tu 2024, arXiv 2405.10637) and its kin (2410.14442)."""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from transformers import PreTrainedConfig

from kvtrain.models.hosts import common_key_value_shape, host_adapter, windows
from kvtrain.models.lckv.kv_map import KVMap, parse_map, repeats, values_map
from kvtrain.models.method import Method, Repeat


@dataclass(frozen=True)
class LCKV(Method):
    """Let layers read the keys and values of other layers; those that nobody reads are never computed.

    Args:
        kv_map: Whose keys and values each layer reads: a preset for any depth or a map such as ``"0_4_4_4_4_5"``;
            ``kv_map.parse_map`` has the grammar. ``"lckv-w2"``: one layer of its own at each end, the rest reads the
            top one of the rest.
        forward_passes: Passes without gradient over layers that read from above, m (paper and code: 7).
        backward_passes: Passes with gradient after them, b (paper and code: 2); more are less stable.
        mask_all_diagonals: No token sees itself in any layer, instead of in those that read from above alone. The
            published checkpoints were trained so.
        stale_target: Within a pass, the layers that read a cyclic stage's keys and values see those of the pass
            before, the owner itself included (the code published first). Needs ``mask_all_diagonals``; the fixed
            point is the same.
        sliding_window: Latest tokens that a layer marked ``s`` sees, its own included.
        value_map: Whose values, where they differ from the keys' (FusedKV, arXiv 2512.03870): a map, or ``"first"``
            for the values of layer 0. None: values follow keys.
        residual: Add a learned share of the first layer's keys and values to those of every owner above it
            (YOCO++, arXiv 2604.13556); four numbers a layer, at first without effect.
        init: Keys and values of an owner start from its own projections (``"copy"``) or from the mean over its
            readers (``"mean"``; the authors recommend it in most cases, heads are not aligned).
        prefill_block: Tokens that iterate together while a prompt is read, counted from each row's own start. Up to
            ``forward_passes + backward_passes`` the result is exact, that of token-by-token decoding.
        prefill_tolerance: Iterate every token until its keys and values, and those of the tokens before it, change by
            less than this share of the largest, instead of for a fixed number of passes.
        page_size: Slots in a page of the serving cache.

    Raises:
        ValueError: A value is out of range.
    """

    name: ClassVar[str] = "lckv"
    marks_windows: ClassVar[bool] = True
    supports_context_parallel: ClassVar[bool] = True

    kv_map: str = "lckv-w2"
    forward_passes: int = 7
    backward_passes: int = 2
    mask_all_diagonals: bool = False
    stale_target: bool = False
    sliding_window: int = 4096
    value_map: str | None = None
    residual: bool = False
    init: Literal["copy", "mean"] = "copy"
    prefill_block: int = 64
    prefill_tolerance: float | None = None
    page_size: int = 32

    def __post_init__(self) -> None:
        if self.forward_passes < 0:
            raise ValueError(f"forward_passes must not be negative, not {self.forward_passes}")
        for name in ("backward_passes", "sliding_window", "prefill_block", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.stale_target and not self.mask_all_diagonals:
            raise ValueError("stale_target needs mask_all_diagonals=True: a token's own keys would come a pass late")
        if self.init not in ("copy", "mean"):
            raise ValueError(f"init must be 'copy' or 'mean', not {self.init!r}")
        if self.prefill_tolerance is not None and self.prefill_tolerance <= 0:
            raise ValueError(f"prefill_tolerance must be above 0, not {self.prefill_tolerance}; None for fixed passes")

    @property
    def passes(self) -> int:
        """Passes over a cyclic stage in all, m + b."""
        return self.forward_passes + self.backward_passes

    def maps(self, depth: int) -> tuple[KVMap, KVMap]:
        """Maps of keys and of values for so many layers.

        Raises:
            ValueError: They do not fit.
        """
        return _maps(self.kv_map, self.value_map, depth)

    def validate(self, host_config: PreTrainedConfig) -> None:
        """See ``Method.validate``."""
        common_key_value_shape(host_config)
        _refuse_several_rotations(host_config)
        keys, _ = self.maps(host_config.num_hidden_layers)
        self._check_windows(keys, windows(host_config))
        for stage in keys.stages():
            for layer in range(stage.first, stage.last + 1) if stage.cyclic else ():
                if keys.sources[layer] < stage.first and keys.sliding[layer]:
                    raise ValueError(
                        f"kv_map {self.kv_map!r}: layer {layer} iterates and reads the sliding layer "
                        f"{keys.sources[layer]} below; drop the 's' of both, or let it read a layer from "
                        f"{stage.first} to {stage.last}"
                    )
        if self.residual and (keys.sources[0] != 0 or any(stage.cyclic for stage in keys.stages())):
            raise ValueError("residual needs a kv_map that reads from below alone, such as 'pizza-bottom'; turn it off")

    def _check_windows(self, keys: KVMap, sliding: Mapping[int, int]) -> None:
        """Refuse a map that says of a sliding host's layers what the host does not."""
        marked = {layer: self.sliding_window for layer, slides in enumerate(keys.sliding) if slides}
        if sliding and marked != sliding:
            own = "_".join(f"{layer}{'s' * (layer in sliding)}" for layer in range(len(keys.sliding)))
            raise ValueError(
                f"this host has layers that see {max(sliding.values())} tokens; say so in kv_map, such as {own!r} with "
                f"sliding_window={max(sliding.values())}, or take a host whose layers all see everything"
            )

    def training_cost(self, host_config: PreTrainedConfig) -> float:
        """See ``Method.training_cost``."""
        depth = int(host_config.num_hidden_layers)
        forward = backward = depth
        for stage in self.maps(depth)[0].stages():
            if stage.cyclic:  # whose last layer does next to nothing in any pass but the last
                forward += (self.passes - 1) * (stage.last - stage.first)
                backward += (self.backward_passes - 1) * (stage.last - stage.first)
        return (forward + 2 * backward) / (3 * depth)

    def repeats(self, host_config: PreTrainedConfig) -> list[Repeat]:
        """See ``Method.repeats``."""
        return repeats(*self.maps(host_config.num_hidden_layers))

    def simplified(self, dropped: Collection[int], host_config: PreTrainedConfig) -> Self:
        """See ``Method.simplified``; of passes without gradient the second is like all after it."""
        keys, values = (kv_map.without(dropped) for kv_map in self.maps(host_config.num_hidden_layers))
        return replace(
            self,
            kv_map=str(keys),
            value_map=None if self.value_map is None else str(values),
            forward_passes=min(self.forward_passes, 2),
        )

    def runs_layers_once(self, host_config: PreTrainedConfig) -> bool:
        """See ``Method.runs_layers_once``."""
        return not any(stage.cyclic for stage in self.maps(host_config.num_hidden_layers)[0].stages())

    def recorded_states(self, host_config: PreTrainedConfig) -> list[int]:
        """See ``Method.recorded_states``; what a stage that iterates begins with counts, what is inside does not."""
        stages = self.maps(host_config.num_hidden_layers)[0].stages()
        return [
            index
            for stage in stages
            for index in range(stage.first, stage.first + 1 if stage.cyclic else stage.last + 1)
        ]


@functools.cache
def _maps(kv_map: str, value_map: str | None, depth: int) -> tuple[KVMap, KVMap]:
    keys = parse_map(kv_map, depth)
    return keys, values_map(value_map, keys)


def _refuse_several_rotations(host_config: PreTrainedConfig) -> None:
    adapter, layers = host_adapter(host_config), range(host_config.num_hidden_layers)
    first, *others = (adapter.rotary_parameters(host_config, layer_idx) for layer_idx in layers)
    if any(parameters != first for parameters in others):
        raise ValueError(
            "layers of this host rotate keys differently (rope_parameters by layer type), so that none can read "
            "another's; take a method that leaves every layer its own keys, such as kvtrain.DMC, or another host"
        )
