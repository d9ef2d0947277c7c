"""The kernels of linear attention against fla's, torch's chunks and softmax attention, forward and backward.

4 rows, 16 heads, bfloat16. fla's results are compared with ours before they are timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.measure import NO_DEVICE, Bench
from benchmarks.gpu.packages import problem_of
from kvtrain.kernels.linear_attention import linear_attention

ROWS, HEADS = 4, 16
SIZES = ((2048, 64), (2048, 128), (8192, 64), (8192, 128))  # tokens, channels
WARM_UP, STEPS = 3, 15
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None, backend: str) -> Tensor:
    """``(B, H, T, D)``."""
    return linear_attention(query, key, value, slopes=slopes, backend=backend)[0]


def fla(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> Tensor:
    """The same through fla, ``(B, T, H, D)``: its tokens come before its heads."""
    from fla.ops.simple_gla import chunk_simple_gla

    output: Tensor = chunk_simple_gla(query, key, value, g_gamma=None if slopes is None else -slopes, scale=1.0)[0]
    return output


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's."""
    return scaled_dot_product_attention(query, key, value, is_causal=True)


@dataclass
class Contender:
    """An operator with tensors laid out as it wants them.

    Args:
        attend: The operator.
        parts: Query, key and value ``(B, H, T, D)``.
        tokens_first: It wants ``(B, T, H, D)``.
        linear: It computes what ours does.
    """

    attend: Attend
    parts: list[Tensor]
    tokens_first: bool = False
    linear: bool = True

    def __post_init__(self) -> None:
        self.parts = [self._turn(part).detach().contiguous().requires_grad_() for part in self.parts]

    def _turn(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if self.tokens_first else tensor

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The output."""
        return self.attend(*self.parts)

    def both(self) -> list[Tensor]:
        """Output and gradients of its mean square, ``(B, H, T, D)``."""
        output = self.attend(*self.parts)
        grads = torch.autograd.grad(output.float().square().mean(), self.parts)
        return [self._turn(tensor) for tensor in (output.detach(), *grads)]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative one of several tensors."""
    pairs = zip(found, expected, strict=True)
    return max(((one.float() - other.float()).norm() / other.float().norm()).item() for one, other in pairs)


def compare(bench: Bench, own: Contender, other: Contender) -> str:
    """Times of two, forward alone and with the backward pass."""
    answers = [f"differs by {distance(other.both(), own.both()):.1e}"] if other.linear else []
    kinds = {"forward": (own.forward, other.forward), "with backward": (own.both, other.both)}
    for name, (mine, theirs) in kinds.items():
        times = bench.medians({"own": mine, "other": theirs}, WARM_UP, STEPS)
        shown = f"{1e3 * times['other']:.3f} ms, ours {1e3 * times['own']:.3f} ms"
        answers.append(f"{name} {shown}, {times['other'] / times['own']:.2f} of ours")
    return "; ".join(answers)


def contenders(parts: list[Tensor], slopes: Tensor | None, *, with_fla: bool) -> dict[str, Contender]:
    """What ours is compared with."""
    found = {"fla": Contender(partial(fla, slopes=slopes), parts, tokens_first=True)} if with_fla else {}
    found["torch"] = Contender(partial(ours, slopes=slopes, backend="torch"), parts)
    return found | {"softmax": Contender(softmax, parts, linear=False)}


def run(bench: Bench) -> None:
    """A line for every size, decay and contender."""
    on_gpu = bench.device.type == "cuda"
    absent = problem_of("flash-linear-attention") or (None if on_gpu else "no CUDA device")
    if absent:
        bench.write(f"  fla: not run: {absent}")
    if not on_gpu:
        bench.write(f"  triton: {NO_DEVICE}")
    for length, channels in ((96, 8),) if bench.small else SIZES:
        torch.manual_seed(0)
        shape = (1, 2, length, channels) if bench.small else (ROWS, HEADS, length, channels)
        parts = [(torch.randn(shape, device=bench.device) * channels**-0.5).to(bench.dtype) for _ in range(3)]
        for name, slopes in (("", None), (", decay", torch.linspace(0.002, 0.1, shape[1], device=bench.device))):
            own = Contender(partial(ours, slopes=slopes, backend="triton" if on_gpu else "torch"), parts)
            for other, contender in contenders(parts, slopes, with_fla=not absent).items():
                title = f"{length:,} tokens, {channels} channels{name}, {other}"
                bench.measure(title, partial(compare, bench, own, contender))
