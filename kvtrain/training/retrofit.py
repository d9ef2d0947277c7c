"""Training on from a pretrained host, with any method in it."""

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvtrain.assets import resolve
from kvtrain.data.packing import Batch
from kvtrain.errors import UsageError, explain_load_errors
from kvtrain.losses.distillation import Distillation
from kvtrain.models.adapters import (
    LORA_KEY,
    LoRA,
    add_adapters,
    base_layers,
    first_values,
    is_adapter,
    plain_name,
    without_adapters,
)
from kvtrain.models.full import Full
from kvtrain.models.gating import borrowed_rows
from kvtrain.models.gqa import convert_gqa, gqa_config, gqa_state, share_unchanged
from kvtrain.models.host import retrofit
from kvtrain.models.method import Method
from kvtrain.models.registry import builder
from kvtrain.models.weights import host_weights
from kvtrain.recipes import find_config
from kvtrain.training.method_module import MethodModule, meta_model
from kvtrain.training.strategies.base import Tensors, traits
from kvtrain.training.teachers import second_model, sharing, teach

Weights = Literal["float32", "bfloat16"]

_GIB = 1 << 30
_WORTH_SAYING = 64 << 20  # bytes
logger = logging.getLogger("kvtrain")


class RetrofitModule(MethodModule):
    """Continues the training of a pretrained host with a method in it.

    With ``Full`` it is the control of every retrofit: the same recipe, the method off.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: The method; ``Full`` leaves the host as it is.
        base_config: Configuration file of the base, for estimates where its weights are not at hand.
        distill: Learn from the untouched base's distribution instead of from the next token alone; costs a forward pass
            of the base, needs far fewer tokens. ``true``, or the settings of a ``Distillation``.
        num_key_value_heads: Convert the base to so many first (``kvtrain.convert_gqa``); the teacher stays as it was.
        lora: Train adapters, and what the method adds to the host, in place of the host's weights. The teacher then
            shares with the model all that does not train, where every rank has whole weights; checkpoints hold what is
            learnt alone, and exporting merges it into the base.
        weights: Type of the weights that do not train; what does is float32.
        **training: See ``TrainingModule``.
    """

    def __init__(
        self,
        base: str,
        method: Method | None = None,
        base_config: str | None = None,
        distill: Distillation | bool | None = False,  # a wrong recipe is told what the first type says
        num_key_value_heads: int | None = None,
        lora: LoRA | None = None,
        weights: Weights = "float32",
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.method, self.lora = method or Full(), lora
        if weights != "float32" and self.trains_base:
            raise ValueError("weights that train are float32; set weights for frozen ones alone, beside lora")
        self.base_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[weights]
        self.base, self.base_config, self.num_key_value_heads = base, base_config, num_key_value_heads
        self.distillation = Distillation() if distill is True else distill or None
        # In a tuple, so that it is no submodule: no optimizer, checkpoint or strategy ever sees it.
        self._teacher: tuple[PreTrainedModel, ...] = ()
        self._sharing_teacher: list[PreTrainedModel] = []  # likewise, until it teaches

    @property
    def trains_base(self) -> bool:
        """Whether the host's own weights train."""
        return self.lora is None

    @property
    def teaches_itself(self) -> bool:
        """Whether the model is its own teacher, in another form and without adapters."""
        return False

    def is_trainable(self, name: str) -> bool:
        """See ``TrainingModule``; beside adapters what the method adds to the host trains, too."""
        if self.lora is None:
            return self.learns(name)
        plain = plain_name(name)
        is_own = plain not in self._host_names or plain.split(".")[-2] in self.lora.train_also
        return is_adapter(name) or is_own

    def as_base(self) -> AbstractContextManager[None]:
        """While it is open, the model's weights are the base's; for modules whose model teaches itself."""
        return nullcontext() if self.lora is None else without_adapters(self.model)

    def learns(self, name: str) -> bool:
        """Whether the parameter of this name is learnt where there are no adapters."""
        return True

    def frozen_base(self) -> dict[str, Any] | None:
        """See ``TrainingModule``."""
        if self.trains_base:
            return None
        lora = None if self.lora is None else self.lora.to_dict()
        return {"base": self.base, "num_key_value_heads": self.num_key_value_heads, LORA_KEY: lora}

    @functools.cached_property
    def _host_names(self) -> set[str]:
        """Parameters of the plain host."""
        with torch.device("meta"):
            return set(AutoModelForCausalLM.from_config(self.host_config()).state_dict())

    def host_config(self) -> PreTrainedConfig:
        """Configuration of the base, its key-value heads converted.

        Raises:
            ValueError: It cannot be had, or the heads do not divide.
        """
        config = self.plain_config()
        return gqa_config(config, self.num_key_value_heads) if self.num_key_value_heads else config

    def plain_config(self) -> PreTrainedConfig:
        """Configuration of the base as it is.

        Raises:
            ValueError: It cannot be had.
        """
        path = find_config(self.base_config) if self.base_config else resolve(self.base)
        return self.read_config(path, "set base_config or download the base")

    def on_fit_start(self) -> None:
        """Load the teacher where there is one."""
        super().on_fit_start()
        if self.distillation and not self.teaches_itself:
            self._teacher = (traits(self._trainer).build_teacher(self),)

    def build_teacher(self) -> PreTrainedModel:
        """The base as it is, on the device; beside adapters it has the very weights of the model that stay."""
        if not self._sharing_teacher:
            return second_model(self._load_base(), self.device)
        quantized = self.lora is not None and self.lora.quantize
        modules = base_layers(self.model, self._unchanged) if quantized else {}
        teacher, shared = second_model(self._sharing_teacher.pop(), self.device, modules), set(self.model.parameters())
        for parameter in teacher.parameters():  # a strategy may have narrowed what they share
            if parameter not in shared and parameter.is_floating_point():
                parameter.data = parameter.data.to(self.model.dtype)
        return teacher

    def build_meta_teacher(self) -> nn.Module:
        """The base as it is, on the meta device."""
        return meta_model(self.plain_config(), Full(), self.base_dtype)

    def teacher_weights(self) -> Tensors:
        """The base's weights, mapped from its files."""
        return self._map_base()

    def teacher_model(self) -> nn.Module | None:
        """See ``TrainingModule``; the untouched base, or the model itself."""
        if self.teaches_itself:
            return self.model if self.distillation else None
        return self._teacher[0] if self._teacher else None

    def teacher_inputs(self, batch: Batch) -> tuple[Batch, dict[str, Any]]:
        """The base's last hidden states of this batch with its head, and how to learn from them."""
        if not self._teacher:
            return batch, {}
        return batch, {"teacher": teach(self._teacher[0], batch), "distillation": self.distillation}

    def build_model(self) -> PreTrainedModel:
        """Load the base, convert its heads and retrofit it; what does not train is frozen."""
        plain = self._load_base()
        host = plain
        if self.num_key_value_heads:
            host = convert_gqa(plain, self.num_key_value_heads)
            if self.lora is not None:
                share_unchanged(host, plain)
        model = retrofit(host, self.method)
        if self.lora is not None:
            theirs = dict(plain.named_parameters())
            self._unchanged = {name for name, own in model.named_parameters() if own is theirs.get(name)}
            add_adapters(model, self.lora, borrowed_rows(model), self.seed)
            if self.distillation and self.shares_teacher and not self.teaches_itself:
                self._sharing_teacher = [sharing(plain, model, self.is_trainable)]
        if not self.trains_base:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.is_trainable(name))
            self._widen(model)
        return model

    def _widen(self, model: nn.Module) -> None:
        """Hold in float32 what trains, whatever the rest is held in."""
        for name, parameter in model.named_parameters():
            if self.is_trainable(name):
                parameter.data = parameter.data.float()

    def divide_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See ``TrainingModule``; adapters may learn faster or slower."""
        if self.lora is None or self.lora.learning_rate_scale == 1.0:
            return groups
        adapters = {parameter for name, parameter in self.model.named_parameters() if is_adapter(name)}
        parts = []
        for group in groups:
            own, others = ([p for p in group["params"] if (p in adapters) == wanted] for wanted in (True, False))
            parts += [{**group, "params": own, "lr": self.lora.learning_rate_scale}, {**group, "params": others}]
        return parts

    def build_meta_model(self) -> nn.Module:
        """See ``TrainingModule``."""
        model = super().build_meta_model()
        if self.lora is not None:
            add_adapters(model, self.lora, borrowed_rows(model), self.seed)
            self._widen(model)
        return model

    def pretrained_weights(self) -> Tensors:
        """See ``TrainingModule``; what the conversion of heads and the method make anew is in memory.

        Raises:
            UsageError: They are to be quantised, which takes whole ones.
        """
        if self.lora is not None and self.lora.quantize:
            raise UsageError("lora.quantize takes whole weights on every rank; train on one device, or with ddp")
        mapped = self._map_base()
        state = dict(mapped)
        if self.num_key_value_heads:
            state = gqa_state(state, self.plain_config(), self.num_key_value_heads)
        adapted = builder(self.method, self.host_config()).adapt_state(state)
        files = {id(tensor) for tensor in mapped.values()}
        computed = sum(tensor.nbytes for tensor in adapted.values() if id(tensor) not in files)
        if computed >= _WORTH_SAYING:
            logger.info("%.1f GiB of weights are computed from the base's, whole on each rank", computed / _GIB)
        if self.lora is None:
            return adapted
        shapes = {name: tensor.shape for name, tensor in self.build_meta_model().state_dict().items()}
        first = first_values(shapes, self.seed)
        return {name: first[name] if name in first else adapted[plain_name(name)] for name in shapes}

    def _map_base(self) -> dict[str, Tensor]:
        path = resolve(self.base)
        with explain_load_errors(self.base):
            return host_weights(path, self.plain_config())

    def _load_base(self) -> PreTrainedModel:
        path = resolve(self.base)
        with explain_load_errors(self.base):
            host: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=self.base_dtype)
        return host
