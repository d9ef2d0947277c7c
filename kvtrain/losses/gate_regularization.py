"""What pulls gates down: their size, or a sparsity to be met."""

from torch import Tensor


def gate_size(gates: Tensor) -> Tensor:
    """Mean absolute gate (DuoAttention, equation 2, as a mean over heads).

    Args:
        gates: ``(layers, H_kv)``.
    """
    return gates.abs().mean()


def sparsity_penalty(sparsity: Tensor, target: float, multipliers: Tensor) -> Tensor:
    """``m_1 (s - t) + m_2 (s - t)^2``, whose saddle lies where the sparsity is met (PruLong, section 3).

    Args:
        sparsity: Expected share of closed gates, s.
        target: Share aimed at, t.
        multipliers: ``(2,)``, learnt by ascent.
    """
    gap = sparsity - target
    return multipliers[0] * gap + multipliers[1] * gap.square()
