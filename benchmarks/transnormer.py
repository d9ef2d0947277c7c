"""TransNormer's linear attention beside softmax attention and the quadratic form: operator, layer, decoding.

The operator alone: 8 heads of 64, one row, float32, forward and backward. The layer: NormAttention and DiagAttention
of width 512 with projections, beside the same layer with torch's attention. Decoding: a whole layer fed one token at a
time after texts of growing length. Contenders take turns; figures are medians.

    python benchmarks/transnormer.py
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from turns import machine, median_seconds

import kvtrain
from kvtrain.kernels.linear_attention import linear_attention, linear_attention_reference
from kvtrain.models.transnormer.attention import DiagAttention, Layout, NormAttention

HEADS, HEAD_DIM = 8, 64
WIDTH = HEADS * HEAD_DIM
AGAINST, FLAT, DEPTHS = (2048, 4096, 8192), (2048, 4096, 8192, 16384, 32768, 65536), (1000, 10000, 100000)
DENSE = 4096  # the quadratic form's scores at this length take 512 MiB a copy


def passes(attend: Callable[[Tensor, Tensor, Tensor], Tensor], length: int) -> Callable[[], None]:
    """A function that runs an operator forward and backward."""
    generator = torch.Generator().manual_seed(length)
    parts = [torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).requires_grad_() for _ in range(3)]
    gradient = torch.randn(1, HEADS, length, HEAD_DIM, generator=generator)

    def run() -> None:
        torch.autograd.grad(attend(*parts), parts, gradient)

    return run


def chunked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Ours."""
    return linear_attention(query, key, value)[0]


def quadratic(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition: all scores, masked."""
    return linear_attention_reference(query, key, value)[0]


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's."""
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def operator() -> None:
    """Ratios of forward and backward passes."""
    for length in AGAINST:
        contenders = {"linear": passes(chunked, length), "softmax": passes(softmax, length)}
        if length == DENSE:
            contenders["quadratic"] = passes(quadratic, length)
        times = median_seconds(contenders, 1, 5)
        for name in list(contenders)[1:]:
            ours, ratio = 1e3 * times["linear"], times[name] / times["linear"]
            print(f"operator, {length:6,} tokens: linear {ours:7.1f} ms, {ratio:5.1f}x faster than {name}")


def flatness() -> None:
    """Cost of a token as texts grow."""
    times = median_seconds({str(length): passes(chunked, length) for length in FLAT}, 1, 5)
    for length in FLAT:
        print(f"operator, {length:6,} tokens: {1e6 * times[str(length)] / length:6.2f} us a token")


class SoftmaxLayer(nn.Module):
    """The projections of a TransNormer layer around torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden: Tensor, _: Layout) -> Tensor:
        """Attend ``(B, T, D)``."""
        heads = [p(hidden).unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2) for p in list(self.projections)[:3]]
        output: Tensor = self.projections[3](softmax(*heads).transpose(1, 2).flatten(2))
        return output


def layers() -> None:
    """Ratios of whole attention layers, forward and backward."""
    config = kvtrain.TransNormerConfig(hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=2)
    t1 = kvtrain.TransNormerConfig(hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=2, variant="T1")
    modules: dict[str, nn.Module] = {
        "softmax": SoftmaxLayer(),
        "Norm": NormAttention(config, 1),
        "Diag T2": DiagAttention(config, 0),
        "Diag T1": DiagAttention(t1, 0),
    }
    for name, module in modules.items():
        if name != "softmax":
            module.relative_position.reset_parameters()
    for length in AGAINST:
        hidden = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layout = Layout(torch.arange(length)[None], None, aligned=True)

        def run(module: nn.Module, hidden: Tensor = hidden, layout: Layout = layout) -> None:
            module(hidden, layout).sum().backward()

        times = median_seconds({name: (lambda m=module: run(m)) for name, module in modules.items()}, 1, 3)
        shown = ", ".join(f"{name} {times['softmax'] / times[name]:.2f}x" for name in list(modules)[1:])
        print(f"layer, {length:6,} tokens: softmax {1e3 * times['softmax']:7.1f} ms; {shown} its speed")


@torch.no_grad()
def decode() -> None:
    """Time and bytes of one more token after texts of growing length."""
    config = kvtrain.TransNormerConfig(hidden_size=WIDTH, num_attention_heads=HEADS, vocab_size=1024)
    torch.manual_seed(0)
    model: Any = kvtrain.TransNormerForCausalLM(config).eval()
    caches = {}
    for depth in DEPTHS:
        cache = caches[depth] = model.make_cache()
        for part in torch.randint(2, 1024, (1, depth), generator=torch.Generator().manual_seed(0)).split(4096, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
    token = torch.full((1, 1), 7)
    contenders = {str(depth): (lambda c=cache: model(token, past_key_values=c)) for depth, cache in caches.items()}
    times = median_seconds(contenders, 5, 100)
    before = 2 * config.num_hidden_layers * WIDTH * 4
    for depth, cache in caches.items():
        less = before * depth / cache.kv_bytes()
        print(
            f"decoding after {depth:7,} tokens: {1e3 * times[str(depth)]:5.2f} ms a token, "
            f"cache {cache.kv_bytes() / 2**20:.2f} MiB, {less:,.1f}x less than keys and values"
        )
    print(f"decoding: the slowest of them takes {max(times.values()) / min(times.values()):.2f}x the fastest's time")


if __name__ == "__main__":
    print(machine())
    operator()
    flatness()
    layers()
    decode()
