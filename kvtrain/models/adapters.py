"""Low-rank adapters in a retrofitted model, by PEFT, and rows of a weight that learn beside a frozen one.

A frozen weight keeps its name behind ``base_layer``; what learns stands beside it: PEFT's matrices, and where a method
borrows a channel of a projection the rows that make it (``OwnRows``). A served model has neither: ``merged`` puts
both into the weights.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvtrain.errors import UsageError
from kvtrain.models.quantized_base import Quantization, check_quantization, quantize
from kvtrain.models.weights import StoredWeights

LORA_KEY = "lora"  # of checkpoints' settings
ADAPTER = "default"  # PEFT's name of the only one
_BASE_LAYER, _ROWS, _LORA = ".base_layer", "own_rows", ".lora_"
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", *_FEED_FORWARD)


@dataclass(frozen=True)
class LoRA:
    """Adapters of low rank, as PEFT makes them (Hu et al. 2021, arXiv 2106.09685).

    Args:
        rank: Of both matrices.
        alpha: Their product is scaled by ``alpha / rank``.
        dropout: On what enters them, while training.
        targets: Last names of the linear modules that get them.
        train_also: Last names of linear modules whose own weights train, too, whole.
        learning_rate_scale: Adapters learn at so large a multiple of the learning rate.
        use_rslora: Scale by ``alpha / sqrt(rank)``.
        use_dora: Learn the length of every row of a weight beside its direction.
        quantize: Hold the frozen weights of the targets in 8 bits (``int8``) or in 4 (``nf4``) while adapters train.

    Raises:
        ValueError: A number is out of range, there is no target, or no package to quantise with.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: list(_PROJECTIONS))
    train_also: list[str] = field(default_factory=list)
    learning_rate_scale: float = 1.0
    use_rslora: bool = False
    use_dora: bool = False
    quantize: Quantization | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, not {self.rank}")
        if self.learning_rate_scale <= 0:
            raise ValueError(f"lora.learning_rate_scale must be above 0, not {self.learning_rate_scale:g}")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha must be above 0, not {self.alpha:g}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be from 0 to below 1, not {self.dropout:g}")
        if self.quantize:
            check_quantization(self.quantize)
        if not self.targets:
            raise ValueError(f"lora.targets names no module; the usual ones are {', '.join(_PROJECTIONS)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    def peft_config(self, **others: Any) -> Any:
        """PEFT's settings.

        Raises:
            UsageError: PEFT is not installed.
        """
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise UsageError("adapters need PEFT; pip install 'kvtrain[lora]'") from error
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # any number does
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            **others,
        )


class OwnRows(nn.Module):
    """A linear module, some of whose outputs come from rows of their own while it is ``active``.

    Args:
        inner: The module.
        rows: Which outputs.

    Attributes:
        active: Whether they do; otherwise the module is as it was.
    """

    def __init__(self, inner: nn.Module, rows: slice) -> None:
        super().__init__()
        self.inner, self.rows, self.active = inner, rows, False
        linear: Any = _innermost(inner)
        count = len(range(linear.out_features)[rows])
        own = nn.Linear(linear.in_features, count, linear.bias is not None, linear.weight.device, torch.float32)
        for parameter in own.parameters():
            nn.init.zeros_(parameter)
        self.add_module(_ROWS, own)

    def forward(self, hidden: Tensor) -> Tensor:
        """Outputs ``(..., out)`` of inputs ``(..., in)``."""
        output: Tensor = self.inner(hidden)
        own: nn.Linear = getattr(self, _ROWS)
        if self.active:
            output = output.clone()
            output[..., self.rows] = own(hidden.to(own.weight.dtype)).to(output.dtype)
        elif torch.is_grad_enabled():  # no gradient at all would be a fault to those who sum them over ranks
            nothing = 0.0 * own(hidden.flatten(0, -2)[:1].to(own.weight.dtype)).sum()  # called: ZeRO-3 gathers it then
            output = output + nothing.to(output.dtype)
        return output


def add_adapters(model: nn.Module, settings: LoRA, borrowed: Mapping[str, slice], seed: int = 0) -> None:
    """Put adapters, and rows of their own, into a model, in place; the model computes what it did.

    Args:
        model: Any; on the meta device, too.
        settings: Of the adapters.
        borrowed: Linear modules by name, and rows of their weights that shall learn by themselves.
        seed: Of what adapters begin with.

    Raises:
        UsageError: A target is no linear module of the model, or the rank is above a matrix's, or PEFT is missing.
    """
    config = settings.peft_config()
    _check(model, settings)
    if settings.quantize:
        frozen = {*settings.targets} - {*settings.train_also}
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        quantize(model, [name for name in linear if name.rpartition(".")[2] in frozen], settings.quantize)
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model, ADAPTER)
    for name, rows in borrowed.items():
        parent, _, last = name.rpartition(".")
        place = model.get_submodule(parent)
        setattr(place, last, OwnRows(getattr(place, last), rows))
    adapters = {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    for parameter in adapters.values():
        parameter.data = parameter.data.float()
    first = {name: parameter.shape for name, parameter in adapters.items() if ".lora_A." in name}
    for name, value in first_values(first, seed).items():
        adapters[name].data.copy_(value)


def first_values(shapes: Mapping[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """What adapters and rows begin with: as PEFT's do, so that they change nothing, from a seed of their own.

    Args:
        shapes: Of parameters by name, in the model's order; those of adapters count.
        seed: Of the first matrices.

    Raises:
        UsageError: A length of DoRA's, which depends on the weight.
    """
    generator, values = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, shape in shapes.items():
        if ".lora_A." in name:
            values[name] = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
        elif "magnitude" in name and is_adapter(name):
            raise UsageError("lora.use_dora needs whole weights on every rank; leave it out, or train without sharding")
        elif is_adapter(name):
            values[name] = torch.zeros(shape)
    return values


def _check(model: nn.Module, settings: LoRA) -> None:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    there = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    for name, parameter in model.named_parameters():
        place, _, last = name.rpartition(".")
        if parameter.dim() == 3 and last in settings.targets:
            usable = ", ".join(one for one in settings.targets if one not in _FEED_FORWARD) or "q_proj"
            raise UsageError(f"lora: {last!r} of {place} are experts, which get no adapters; lora.targets: [{usable}]")
    for target in [*settings.targets, *settings.train_also]:
        if target not in there:
            raise UsageError(f"lora: the model has no linear module {target!r}; there are {', '.join(there)}")
    for name, module in linear.items():
        if id(module.weight) in tied and name.rpartition(".")[2] in {*settings.targets, *settings.train_also}:
            raise UsageError(f"lora: {name} has the weight of the embeddings, into which nothing merges; leave it out")
        if name.rpartition(".")[2] in settings.targets and settings.rank > min(module.weight.shape):
            size = " x ".join(map(str, module.weight.shape))
            raise UsageError(f"lora.rank is {settings.rank}, more than {name} ({size}) can have; lower it")


def refuse_adapter(path: str) -> None:
    """Refuse what is no model by itself.

    Raises:
        UsageError: The folder holds PEFT's adapters, beside a model or without one.
    """
    file = Path(path) / "adapter_config.json"
    if file.is_file():
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise UsageError(
            f"{path} holds adapters of PEFT, for {base}: merge them first, "
            "peft.AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)"
        )


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name stands beside a frozen weight."""
    return _LORA in name or f".{_ROWS}." in name


def plain_name(name: str) -> str:
    """The name of a parameter as it was without adapters."""
    return name.replace(_BASE_LAYER, "").replace(".inner.", ".")


def base_layers(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """Modules behind adapters, by the names that they had without them.

    Args:
        model: With adapters.
        names: Of weights; the modules of others are left out.
    """
    found = {
        plain_name(f"{name}.weight"): module
        for name, module in model.named_modules()
        if name.endswith(_BASE_LAYER) and isinstance(module, nn.Linear)
    }
    return {name.removesuffix(".weight"): module for name, module in found.items() if name in names}


def own_rows(model: nn.Module) -> Iterator[OwnRows]:
    """All modules with rows of their own."""
    return (module for module in model.modules() if isinstance(module, OwnRows))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before adapters, for as long as the context is open."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    separate = [module for module in own_rows(model) if module.active]
    for layer in layers:
        layer.enable_adapters(False)
    for module in separate:
        module.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for module in separate:
            module.active = True


def merged(
    base: Mapping[str, Tensor], learnt: Mapping[str, Tensor], settings: LoRA, borrowed: Mapping[str, slice]
) -> StoredWeights:
    """Weights of a model with its adapters merged into it, each computed when it is asked for.

    Args:
        base: Its weights without them, by name.
        learnt: What learns, by the names that it has beside them.
        settings: Of the adapters.
        borrowed: As ``add_adapters`` was given them.
    """
    beside: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for name in learnt:
        if is_adapter(name):
            module, part = _split(name)
            beside.setdefault(module, {})[part] = learnt[name]
        else:
            plain[plain_name(name)] = learnt[name]

    def read(name: str) -> Tensor:
        module, _, part = name.rpartition(".")
        weight = plain.get(name, base.get(name))
        assert weight is not None
        own = beside.get(module, {})
        if part == "weight":
            weight = _with_adapter(weight, own, settings)
        return _with_rows(weight, own.get(f"{_ROWS}.{part}"), borrowed.get(module))

    return StoredWeights({name: name for name in {**base, **plain}}, read)


def peft_tensors(learnt: Mapping[str, Tensor], borrowed: Mapping[str, slice]) -> dict[str, Tensor]:
    """PEFT's matrices by the names under which PEFT stores them, to stand beside a model with all else merged.

    Args:
        learnt: As ``merged`` takes it.
        borrowed: As ``add_adapters`` was given them; rows that have learnt by themselves get nothing from a matrix.

    Raises:
        UsageError: A length of DoRA's belongs to such a row.
    """
    tensors, separate = dict[str, Tensor](), {_split(name)[0] for name in learnt if f".{_ROWS}." in name}
    for name in learnt:
        if _LORA not in name:
            continue
        module, part = _split(name)
        tensor = learnt[name].detach().float()
        if module in separate and "magnitude" in part:
            raise UsageError("DoRA scales rows that the method has learnt by themselves; export without --keep-adapter")
        if module in separate and part.startswith("lora_B."):
            tensor = tensor.clone()
            tensor[borrowed[module]] = 0
        tensors[f"base_model.model.{module}.{part.replace(f'.{ADAPTER}', '')}"] = tensor.contiguous()
    return tensors


def without_matrices(learnt: Mapping[str, Tensor]) -> StoredWeights:
    """What is learnt but for PEFT's matrices."""
    return StoredWeights({name: name for name in learnt if _LORA not in name}, learnt.__getitem__)


def _split(name: str) -> tuple[str, str]:
    """A plain module, and what of its adapters a name stands for."""
    for mark in (_LORA, f".{_ROWS}."):
        module, found, part = name.partition(mark)
        if found:
            return plain_name(f"{module}.").removesuffix("."), f"{found}{part}".removeprefix(".")
    raise AssertionError(name)


def _with_adapter(weight: Tensor, own: Mapping[str, Tensor], settings: LoRA) -> Tensor:
    """A weight that PEFT has merged its matrices into, in float32."""
    state = {part: tensor.float() for part, tensor in own.items() if part.startswith(_LORA.strip("."))}
    if not state:
        return weight
    from peft import inject_adapter_in_model

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.detach().float()
    holder = nn.ModuleDict({settings.targets[0]: linear})
    inject_adapter_in_model(settings.peft_config(), holder, ADAPTER)
    layer: Any = holder[settings.targets[0]]
    layer.load_state_dict({**state, "base_layer.weight": linear.weight})
    layer.merge(safe_merge=True)
    return layer.get_base_layer().weight.detach()  # type: ignore[no-any-return]


def _with_rows(weight: Tensor, own: Tensor | None, rows: slice | None) -> Tensor:
    if own is None:
        return weight
    assert rows is not None
    weight = weight.detach().to(torch.float32, copy=True)
    weight[rows] = own.float()
    return weight


def _innermost(module: Any) -> nn.Module:
    while hasattr(module, "base_layer"):
        module = module.base_layer
    assert isinstance(module, nn.Module)
    return module
