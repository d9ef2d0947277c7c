"""The head of a language model: a matrix, or a module that only its own forward pass knows.

Losses read the matrix where there is one. Adapters, quantized weights, biases, hooks and what else may stand in its
place are asked for logits instead, a chunk of tokens at a time; ``weight_of`` decides.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvtrain.kernels.dispatch import at_least_float32

Head = Tensor | nn.Module  # (V, D), or a module that makes logits (n, V) of hidden states (n, D)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def weight_of(head: Head) -> Tensor | None:
    """The matrix ``(V, D)`` of a head that is ``hidden @ weight.T`` and nothing else; None for any other."""
    if isinstance(head, Tensor):
        return head
    # A parametrised module has a class of its own, and accelerate puts a forward pass of its own on the instance.
    if type(head) is not nn.Linear or "forward" in vars(head) or _is_watched(head):
        return None
    weight, bias = cast("tuple[Any, Any]", (head.weight, head.bias))
    return None if bias is not None or is_traceable_wrapper_subclass(weight) else weight


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks may change what comes out; DeepSpeed's do not: they gather weights, as reading them does."""
    hooks = (hook for name in _HOOKS for hook in getattr(module, name).values())
    return any(getattr(hook, "__module__", "").partition(".")[0] != "deepspeed" for hook in hooks)


def logits_by(head: Head, hidden: Tensor) -> Callable[[Tensor], Tensor]:
    """How to make logits ``(n, V)``, in at least float32, of chunks ``(n, D)`` of hidden states."""
    weight = weight_of(head)
    if weight is None:
        return lambda part: at_least_float32(head(part))  # type: ignore[operator]
    dtype = matmul_dtype(hidden)
    matrix = weight.to(dtype)
    return lambda part: at_least_float32(part.to(dtype) @ matrix.T)


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """What autocast would multiply in; an autograd function does not see it by itself."""
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return hidden.dtype
    return torch.get_autocast_dtype(device)
