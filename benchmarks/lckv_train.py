"""One training step of LCKV against the published plan carried out plainly, and against the plain host.

The plain plan runs every layer of the cyclic stage in every pass (7 without gradient, 2 with), its target's attention
and feed-forward layer included, and the first pass over zeros, through torch's attention with a boolean mask. It uses
the same modules and weights, so that only the plan differs; losses must agree. Forward and backward, no optimizer.
The contenders take turns, so that a busy machine slows them alike; figures are medians.

    python benchmarks/lckv_train.py
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from turns import machine, median_seconds

import kvtrain
from kvtrain.kernels.context_parallel import WHOLE_ROWS
from kvtrain.kernels.cross_entropy import linear_cross_entropy_sum
from kvtrain.kernels.rope import apply_rotary

LENGTH, VOCABULARY, WARM_UP, STEPS = 1024, 4096, 1, 5


def make_host(width: int, layers: int) -> Any:
    """A Llama with random weights, in the proportions of the authors' small model (768 wide, 12 layers, 12/6 heads)."""
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def plain_loss(model: Any, ids: Tensor) -> Tensor:
    """The published plan, every pass whole."""
    decoder, settings = model.model, model.method
    layers = list(decoder.layers)
    sources = settings.maps(len(layers))[0].sources
    hidden = decoder.embed_tokens(ids)
    angles = decoder.rotary_emb(hidden, torch.arange(LENGTH)[None])
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    strict = causal.tril(-1)

    def run(layer: Any, hidden: Tensor, given: tuple[Tensor, Tensor] | None, mask: Tensor) -> tuple[Tensor, Any]:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        query = apply_rotary(attention.split_heads(attention.q_proj(normed)), *angles)
        if given is None:
            key = apply_rotary(attention.split_heads(attention.k_proj(normed)), *angles)
            given = key, attention.split_heads(attention.v_proj(normed))
        key, value = (state.repeat_interleave(attention.num_groups, 1) for state in given)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + attention.project_out(output, WHOLE_ROWS)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), given

    first = next(index for index, source in enumerate(sources) if source > index)
    target = sources[first]
    for layer in layers[:first]:
        hidden = run(layer, hidden, None, causal)[0]
    attention = layers[target].self_attn
    shape = (ids.shape[0], attention.num_key_value_heads, LENGTH, attention.head_dim)
    carried: Any = (hidden.new_zeros(shape), hidden.new_zeros(shape))
    for index in range(settings.passes):
        with torch.set_grad_enabled(index >= settings.forward_passes):
            output = hidden
            for layer in layers[first:target]:
                output = run(layer, output, carried, strict)[0]
            output, carried = run(layers[target], output, None, causal)
    for layer in layers[target + 1 :]:
        output = run(layer, output, None, causal)[0]
    states = decoder.norm(output)[:, :-1].flatten(0, 1)
    return linear_cross_entropy_sum(states, model.lm_head.weight, ids[:, 1:].flatten()) / ids[:, 1:].numel()


def step(loss_of: Callable[[], Tensor]) -> float:
    """Forward and backward; returns the loss."""
    loss = loss_of()
    loss.backward()
    return loss.item()


def main() -> None:
    """Print times, losses and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=1)
    asked = parser.parse_args()
    host = make_host(asked.width, asked.layers)
    lckv = kvtrain.retrofit(host, kvtrain.LCKV(kv_map="lckv-w2")).train()
    full = kvtrain.retrofit(host, kvtrain.Full()).train()
    ids = torch.randint(2, VOCABULARY, (asked.rows, LENGTH), generator=torch.Generator().manual_seed(0))
    losses: dict[str, Callable[[], Tensor]] = {
        "host": lambda: full(ids, labels=ids).loss,
        "plain plan": lambda: plain_loss(lckv, ids),
        "LCKV": lambda: lckv(ids, labels=ids).loss,
    }
    times = median_seconds({name: partial(step, loss_of) for name, loss_of in losses.items()}, WARM_UP, STEPS)
    print(f"{machine()}; width {asked.width}, {asked.layers} layers, {asked.rows} rows of {LENGTH:,} tokens, float32")
    for name, seconds in times.items():
        speed, loss = asked.rows * LENGTH / seconds, losses[name]().item()
        print(f"  {name:12} {seconds:6.3f} s a step, {speed:7,.0f} tok/s, loss {loss:.6f}")
    print(f"ratio LCKV / plain plan: {times['LCKV'] / times['plain plan']:.2f}")
    print(f"ratio LCKV / host: {times['LCKV'] / times['host']:.2f}")


if __name__ == "__main__":
    main()
