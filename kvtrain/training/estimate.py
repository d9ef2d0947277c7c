"""What a recipe will cost, worked out without allocating a weight."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvtrain.models.full import Full
from kvtrain.models.host import retrofit
from kvtrain.models.method import Method
from kvtrain.training.base import TrainingModule

KV_BYTES = 2  # caches are served in half precision
_MOMENTS = 2  # AdamW keeps two for each trained value
# Bytes of a stored weight and of a computed activation, by Lightning's names of precisions.
_PRECISIONS = {
    "16-mixed": (4, 2),
    "bf16-mixed": (4, 2),
    "16-true": (2, 2),
    "bf16-true": (2, 2),
    "64-true": (8, 8),
}
_ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}


@dataclass(frozen=True)
class Estimate:
    """What one device holds while it trains, and what serving holds for each token.

    Attributes:
        model: Class of the host and the method in it.
        parameters: Exact count, shared ones once.
        trainable: Those that train.
        parameter_bytes: Weights as they are stored.
        gradient_bytes: Gradients of the trained ones.
        optimizer_bytes: AdamW's two moments.
        activation_bytes: Approximate, kept for the backward pass of one batch.
        checkpointed_activation_bytes: Approximate, with ``activation_checkpointing``.
        kv_bytes_before: Of one token in the host's cache, in half precision.
        kv_bytes_after: With the method's compression; None where the method's settings alone do not tell.
        batch_size: Rows a device.
        sequence_length: Tokens a row.
        precision: Of the trainer.
    """

    model: str
    parameters: int
    trainable: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    checkpointed_activation_bytes: int
    kv_bytes_before: int
    kv_bytes_after: float | None
    batch_size: int
    sequence_length: int
    precision: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def estimate(module: TrainingModule, *, batch_size: int, sequence_length: int, precision: str | None) -> Estimate:
    """Work out the cost of a training module without replicas or shards.

    Args:
        module: The module, its model not yet built.
        batch_size: Rows a device.
        sequence_length: Tokens a row.
        precision: Lightning's name of it; None is ``32-true``.

    Raises:
        ValueError: The host's configuration cannot be had, or the method refuses it.
    """
    config, name = module.host_config(), _ALIASES.get(str(precision), str(precision or "32-true"))
    stored, computed = bytes_of_precision(name)
    model = meta_model(config, module.method)
    total, trainable = count_parameters(model)
    whole, checkpointed = (
        activation_bytes(config, batch_size, sequence_length, computed, checkpointing=flag) for flag in (False, True)
    )
    before = kv_bytes_per_token(config)
    return Estimate(
        model=f"{type(model).__name__} with {type(module.method).__name__}",
        parameters=total,
        trainable=trainable,
        parameter_bytes=total * stored,
        gradient_bytes=trainable * stored,
        optimizer_bytes=_MOMENTS * trainable * stored,
        activation_bytes=whole,
        checkpointed_activation_bytes=checkpointed,
        kv_bytes_before=before,
        kv_bytes_after=compressed_kv_bytes(before, module.method),
        batch_size=batch_size,
        sequence_length=sequence_length,
        precision=name,
    )


def meta_model(config: PreTrainedConfig, method: Method) -> nn.Module:
    """A host with a method in it, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return retrofit(AutoModelForCausalLM.from_config(config), method)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters and the trainable ones, each shared one counted once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def bytes_of_precision(precision: str) -> tuple[int, int]:
    """Bytes of a stored weight and of an activation."""
    return _PRECISIONS.get(precision, (4, 4))


def head_size(config: PreTrainedConfig) -> int:
    """Numbers in one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_bytes_per_token(config: PreTrainedConfig, element_bytes: int = KV_BYTES) -> int:
    """Bytes that a full cache holds for one token: keys and values of every layer and key-value head."""
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * element_bytes)


def compressed_kv_bytes(before: int, method: Method) -> float | None:
    """Bytes per token with the method; None where its settings alone do not say."""
    if isinstance(method, Full):
        return float(before)
    compression = getattr(method, "compression", None)
    return before / compression if compression else None


def activation_bytes(
    config: PreTrainedConfig, batch_size: int, sequence_length: int, element_bytes: int, *, checkpointing: bool
) -> int:
    """Roughly what the forward pass keeps for the backward pass; logits are never materialised.

    A layer keeps its input, both normalised inputs and the middle of the residual (hidden each), queries and
    attention output (heads), keys and values (key-value heads), and four gated-MLP intermediates.

    Args:
        config: The host.
        batch_size: Rows.
        sequence_length: Tokens a row.
        element_bytes: Of one activation.
        checkpointing: Whether layers are recomputed: then each keeps its input, and one at a time the rest.
    """
    hidden, size = config.hidden_size, head_size(config)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    layer = 4 * hidden + 2 * (heads + groups) * size + 4 * config.intermediate_size
    layers = config.num_hidden_layers
    kept = layers * hidden + layer if checkpointing else layers * layer
    return int((kept + 2 * hidden) * batch_size * sequence_length * element_bytes)


def table_rows(figures: Estimate) -> list[tuple[str, str]]:
    """The lines that ``kvtrain estimate`` prints."""
    after = figures.kv_bytes_after
    served = "decided by training" if after is None else f"{after:,.0f} B ({figures.kv_bytes_before / after:.3g}x less)"
    shape = f"{figures.batch_size} x {figures.sequence_length:,} tokens"
    fixed = figures.parameter_bytes + figures.gradient_bytes + figures.optimizer_bytes
    return [
        ("model", figures.model),
        ("parameters", f"{figures.parameters:,}"),
        ("trainable", f"{figures.trainable:,}"),
        (f"weights ({figures.precision})", readable(figures.parameter_bytes)),
        ("gradients", readable(figures.gradient_bytes)),
        ("optimizer (AdamW)", readable(figures.optimizer_bytes)),
        ("weights + gradients + optimizer", readable(fixed)),
        (f"activations, approximate ({shape})", readable(figures.activation_bytes)),
        ("activations, approximate, checkpointed", readable(figures.checkpointed_activation_bytes)),
        ("KV bytes per token, before", f"{figures.kv_bytes_before:,} B"),
        ("KV bytes per token, after", served),
    ]


def readable(size: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
