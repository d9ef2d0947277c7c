"""Training hybrids: linear layers learn to match the softmax layers that they replace, then the model is distilled.

The order is that of RADLADS (arXiv 2505.03005) and HALO (arXiv 2601.22156).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvtrain.data.packing import Batch
from kvtrain.errors import UsageError
from kvtrain.kernels.cross_entropy import IGNORE_INDEX
from kvtrain.losses.distillation import Distillation
from kvtrain.models.context import LayerOutputs
from kvtrain.models.hosts import host_adapter
from kvtrain.models.hybrid import Hybrid
from kvtrain.models.hybrid.attention import HybridStep
from kvtrain.training.pretrain import PretrainModule
from kvtrain.training.retrofit import RetrofitModule
from kvtrain.training.teachers import teach

MATCH, DISTILL = "match", "distill"
_ORDER = (MATCH, DISTILL)


class HybridModule(RetrofitModule):
    """Makes chosen layers of a pretrained host linear, in two phases, each of which may be left out.

    In ``match`` each linear layer learns to give what the host's attention gives for the same input, and nothing else
    learns: its input is the host's own, because every layer below passes on what the host has there. The loss is the
    mean over layers of ``|mixed - target|^2 / |target|^2``, logged as ``match``. In ``distill`` all weights learn from
    the untouched host's distribution.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: Which layers, and how they attend.
        distill: As in ``RetrofitModule``; the host is needed in both phases.
        **training: See ``RetrofitModule`` and ``TrainingModule``; phases carry the two names, in that order.

    Raises:
        ValueError: Phases of other names or in another order, or one that needs the host without it.
    """

    method: Hybrid

    def __init__(
        self, base: str, method: Hybrid | None = None, distill: Distillation | bool | None = True, **training: Any
    ) -> None:
        super().__init__(base, method or Hybrid(), distill=distill, **training)
        names = [phase.name for phase in self.schedule.phases]
        if names != [name for name in _ORDER if name in names]:
            raise ValueError(
                f"a hybrid's phases are {', '.join(_ORDER)}, in that order; the recipe has {', '.join(names)}"
            )
        if self.distillation is None:
            raise ValueError(
                "linear layers learn from the host; leave distill out, or say how, as in distill: {weight: 0.5}"
            )
        if self.num_key_value_heads and MATCH in names:
            raise ValueError("layers match a host with the same heads; convert heads in a run of its own first")
        if self.lora is not None and MATCH in names:
            raise ValueError(f"with lora the projections of linear layers stay; leave the phase {MATCH} out, or lora")

    @property
    def _matches(self) -> bool:
        """Whether this step is one of the phase ``match``."""
        return self.phase_step().phase.name == MATCH

    def unlike_phases(self) -> list[int]:
        """See ``TrainingModule``; in ``match`` targets are held besides, in ``distill`` the teacher's hidden states."""
        return list(range(len(self.schedule.phases)))

    def require_context_parallel(self, ranks: int) -> None:
        """See ``TrainingModule``; distances are shares of what whole rows hold."""
        if any(phase.name == MATCH for phase in self.schedule.phases):
            raise UsageError(f"the phase {MATCH} needs whole rows; set context_parallel to 1, or leave the phase out")
        super().require_context_parallel(ranks)

    def _linear_names(self) -> dict[str, int]:
        """Linear layers by the prefix of their attention's names."""
        config = self.host_config()
        name = host_adapter(config).attention_name
        return {f"{name(layer)}.": layer for layer in self.method.chosen_layers(config)}

    def teacher_inputs(self, batch: Batch) -> tuple[Batch, dict[str, Any]]:
        """See ``TrainingModule``; while layers match, what the host's attention gives, and no token to predict."""
        if not self._matches:
            return super().teacher_inputs(batch)
        (teacher,) = self._teacher
        with attention_outputs(teacher, self._linear_names()) as targets:
            teach(teacher, batch)
        nothing = torch.full_like(batch["labels"], IGNORE_INDEX)
        return {**batch, "labels": nothing}, {"step": HybridStep(targets), "outputs": LayerOutputs()}

    def extra_loss(self, batch: Batch, arguments: dict[str, Any]) -> Tensor | None:
        """How far linear layers are from what they replace, while they match it."""
        outputs: LayerOutputs | None = arguments.get("outputs")
        if not outputs:
            return None
        distance, size = torch.stack([outputs[layer] for layer in sorted(outputs)]).unbind(1)
        match = (distance / size.clamp(min=torch.finfo(size.dtype).tiny)).mean()
        self.log_mean(MATCH, match.detach(), prog_bar=True)
        return match

    def divide_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See ``TrainingModule``; linear layers' parameters, and the others, which ``match`` leaves alone."""
        parts, matching = [], self._matching
        for group in super().divide_groups(groups):
            own, others = ([p for p in group["params"] if (p in matching) is wanted] for wanted in (True, False))
            parts += [{**group, "params": own}, {**group, "params": others}]
        return parts

    def group_rate(self, group: dict[str, Any]) -> Callable[[int], float]:
        """See ``TrainingModule``; in ``match`` it is 0 for what does not learn then: AdamW leaves that as it is."""
        return super().group_rate(group) if group["params"][0] in self._matching else self._rate_of_others

    @property
    def _matching(self) -> set[nn.Parameter]:
        """What linear layers' attention is made of."""
        prefixes = tuple(self._linear_names())
        return {parameter for name, parameter in self.model.named_parameters() if name.startswith(prefixes)}

    def _rate_of_others(self, step: int) -> float:
        """Learning rate of what is no linear layer's."""
        return 0.0 if self.schedule.phase_step(step).phase.name == MATCH else self.schedule.learning_rate(step)


@contextmanager
def attention_outputs(model: nn.Module, prefixes: dict[str, int]) -> Iterator[dict[int, Tensor]]:
    """While it is open, passes leave here what some layers' attention gives, ``(B, T, hidden)`` by layer.

    Args:
        model: Of any method.
        prefixes: Layers by the prefix of their attention's names.
    """
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> None:
            seen[layer] = output[0]

        return hook

    hooks = [
        model.get_submodule(prefix.removesuffix(".")).register_forward_hook(keep(layer))
        for prefix, layer in prefixes.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class HybridPretrainModule(PretrainModule):
    """Trains a hybrid from nothing.

    Args:
        model_config: HF configuration file of the host.
        method: Which layers are linear, and how they attend.
        **training: See ``PretrainModule`` and ``TrainingModule``.
    """

    def __init__(self, model_config: str, method: Hybrid | None = None, **training: Any) -> None:
        super().__init__(model_config=model_config, method=method or Hybrid(), **training)
