"""How evenly routers use their experts."""

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing(logits: Sequence[Tensor], chosen: int, real: Tensor | None = None) -> Tensor:
    """Equations (4) to (6) of Switch Transformer (Fedus et al. 2021, arXiv 2101.03961), over all layers together.

    Args:
        logits: Of every layer's router, ``(tokens, experts)``.
        chosen: Experts of a token.
        real: ``(tokens,)`` that count; all by default.

    Returns:
        The share of tokens that an expert has times its mean probability, summed over experts, times their number:
        ``chosen`` where all are used alike, up to ``experts`` where few are, and 0 where no token counts.
    """
    device, experts = logits[0].device, logits[0].shape[1]
    load, probability, count = (torch.zeros((), device=device) for _ in range(3))
    for layer in logits:
        probabilities = layer.to(device).softmax(-1, torch.promote_types(layer.dtype, torch.float32))
        used = torch.zeros_like(probabilities).scatter(1, probabilities.topk(chosen).indices, 1.0)
        counts = torch.ones_like(probabilities[:, 0]) if real is None else real.to(probabilities)
        load, probability = load + counts @ used, probability + counts @ probabilities
        count = count + counts.sum()
    count = count.clamp(min=1)
    return experts * (load / count * (probability / count)).sum()
