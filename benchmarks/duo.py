"""DuoAttention: training steps against both attentions computed densely, prefill and decoding against the host.

Training: 2 layers, one row of 4,096 tokens of which the last 256 are learnt from, windows of 128 + 256 tokens, float32;
a step is the teacher's pass, the student's and its backward pass. Serving: 4 layers with random weights and random
full heads; a prompt is read in one call, then one token at a time. Contenders take turns; figures are medians.

    python benchmarks/duo.py
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention as sdpa
from turns import decoding, decoding_lines, machine, median_seconds

import kvtrain
from kvtrain.data.packing import IGNORE_INDEX
from kvtrain.kernels.attention_mask import AttentionMask, visible_pairs
from kvtrain.models.duo import patterns as duo_patterns
from kvtrain.training import DuoModule, Phase
from kvtrain.training import duo as duo_training

LENGTH, ANSWERS, CONTEXT = 4096, 256, 8192
SINK, RECENT = 128, 256


def make_host(layers: int, heads: int = 8, kv_heads: int = 8, head_dim: int = 64) -> Any:
    """A Llama with random weights."""
    config = transformers.LlamaConfig(
        hidden_size=heads * head_dim // 2,
        intermediate_size=heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=4096,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


class DensePatterns(duo_patterns.AttentionPatterns):
    """Both attentions over all pairs, the window as a mask."""

    def streaming(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """By torch's kernel, which skips nothing."""
        positions = torch.arange(query.shape[2])
        mask = visible_pairs(positions[:, None], positions, AttentionMask(window=RECENT, sink=SINK))
        return sdpa(query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=True)

    def full(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """By torch's kernel."""
        return sdpa(query, key, value, is_causal=True, scale=self.scale, enable_gqa=True)

    def mixed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        share = gates.repeat_interleave(query.shape[1] // key.shape[1])[:, None, None]
        return torch.lerp(self.streaming(query, key, value), self.full(query, key, value), share)


@contextmanager
def dense_attention() -> Iterator[None]:
    """Whole rows, and both attentions over all pairs."""
    patterns, field = duo_patterns.AttentionPatterns, duo_training.receptive_field
    duo_patterns.AttentionPatterns, duo_training.receptive_field = DensePatterns, lambda *_: slice(None)  # type: ignore[misc]
    try:
        yield
    finally:
        duo_patterns.AttentionPatterns, duo_training.receptive_field = patterns, field  # type: ignore[misc]


def training_step(mixing: Any, dense: bool) -> Callable[[], None]:
    """A function that takes one step's passes."""
    host = make_host(2, kv_heads=4)
    method = kvtrain.Duo(sink=SINK, recent=RECENT, mixing=mixing)
    module: Any = DuoModule("unused", method, phases=[Phase("gates", 10, 0.02)])
    module._load_base = lambda: host
    module.configure_model()
    module.trainer = types.SimpleNamespace(global_step=0, validating=False)
    for layer in module.model.model.layers:
        layer.self_attn.gates.data.fill_(0.7)
    ids = torch.randint(2, 4096, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(LENGTH) < LENGTH - ANSWERS, IGNORE_INDEX)
    positions = torch.arange(LENGTH)[None]
    batch = {"input_ids": ids, "labels": labels, "document_ids": torch.ones_like(ids), "position_ids": positions}

    def step() -> None:
        with dense_attention() if dense else nullcontext():
            read, kwargs = module.teacher_inputs(batch)
            arguments = {**module.model_arguments(read), **kwargs}
            module.model(read["input_ids"], labels=read["labels"], use_cache=False, **arguments).loss.backward()

    return step


def rounded(host: Any, sparsity: float) -> Any:
    """A model with so many streaming heads, chosen at random."""
    model = kvtrain.retrofit(host, kvtrain.Duo(sink=SINK, recent=RECENT))
    gates = torch.rand(len(model.model.layers), 8, generator=torch.Generator().manual_seed(1))
    return model.binarize(sparsity, gates=gates)


def train() -> None:
    """Steps of both kinds of mixing."""
    steps = {
        f"{mixing}, {'dense' if dense else 'split'}": training_step(mixing, dense)
        for mixing in ("self", "teacher")
        for dense in (True, False)
    }
    times = median_seconds(steps, 1, 3)
    for name, seconds in times.items():
        print(f"  training step, {name:15} {seconds:6.2f} s")
    for mixing in ("self", "teacher"):
        print(f"ratio of a step, {mixing}: {times[f'{mixing}, split'] / times[f'{mixing}, dense']:.2f} of dense")


@torch.no_grad()
def serve() -> None:
    """Prefill and decoding."""
    host = make_host(4)
    models = {"host": host, "50 %": rounded(host, 0.5), "75 %": rounded(host, 0.75)}
    ids = torch.randint(2, 4096, (1, CONTEXT), generator=torch.Generator().manual_seed(0))

    def fresh(model: Any) -> Any:
        return model.make_cache() if hasattr(model, "make_cache") else transformers.DynamicCache(config=host.config)

    def read(model: Any, cache: Any) -> Any:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    prefill = {name: (lambda model=model: read(model, fresh(model))) for name, model in models.items()}
    times = median_seconds(prefill, 1, 2)
    for name, seconds in times.items():
        print(f"  prefill of {CONTEXT:,}, {name:5} {seconds:6.2f} s, {times['host'] / seconds:.2f}x the host's speed")
    caches = {name: read(model, fresh(model)) for name, model in models.items()}
    times = median_seconds({name: decoding(model, caches[name], 1) for name, model in models.items()}, 5, 30)
    print(decoding_lines(times, caches, 1))
    full = 2 * 4 * 8 * 64 * 4 * (CONTEXT + 35)
    for name in ("50 %", "75 %"):
        kept = caches[name].kv_bytes() - caches[name].free_bytes()
        print(f"{name} streaming: decoding {times['host'] / times[name]:.2f}x, memory {full / kept:.2f}x less")


if __name__ == "__main__":
    print(machine())
    train()
    serve()
