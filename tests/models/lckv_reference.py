"""LCKV by its equations, slowly: token by token, or pass by pass with dense masks. Shares no code with kvtrain.

The weights are those of a retrofitted model, under the host's names. Keys are kept as they were before rotation, so
that a token may stand at another position each time it is looked at.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.models import naive_families
from tests.models.naive_experts import naive_experts

KeyValue = tuple[Tensor, Tensor]  # keys before rotation (B, H_kv, T, D), and values


class Reference:
    """One model's equations.

    Args:
        model: Whose weights, norms and angles to use.
        kv_map: ``kv(0)_kv(1)_..`` with an ``s`` for windows.
        values: Likewise for values, where they differ.
        window: Tokens that a layer marked ``s`` sees, its own included.
        closed: No token sees itself, in any layer.
    """

    def __init__(
        self, model: Any, kv_map: str, values: str | None = None, window: int = 4096, closed: bool = False
    ) -> None:
        self.weights: dict[str, Tensor] = dict(model.named_parameters())
        self.config = model.config.host_config
        rotary = next(module for module in model.model.rotary_emb.modules() if hasattr(module, "inv_freq"))
        size = torch.arange(0, self.config.head_dim, 2, dtype=torch.float64) / self.config.head_dim
        plain = rotary.rope_type == "default"
        self.frequencies = naive_families.rotary_base(self.config, 0) ** -size if plain else rotary.inv_freq
        self.amplitude = 1.0 if plain else rotary.attention_scaling
        self.keys = [int(entry.rstrip("s")) for entry in kv_map.split("_")]
        self.values = [int(entry.rstrip("s")) for entry in (values or kv_map).split("_")]
        self.window = [window if entry.endswith("s") else 10**9 for entry in kv_map.split("_")]
        self.closed = [closed or source > layer for layer, source in enumerate(self.keys)]

    # One layer.

    def _weight(self, layer: int, name: str) -> Tensor | None:
        return self.weights.get(f"model.layers.{layer}.{name}")

    def _linear(self, layer: int, name: str, hidden: Tensor) -> Tensor:
        weight, bias = self._weight(layer, f"{name}.weight"), self._weight(layer, f"{name}.bias")
        assert weight is not None
        return hidden @ weight.T + (0 if bias is None else bias)

    def _norm(self, weight: Tensor | None, hidden: Tensor) -> Tensor:
        if weight is None:
            return hidden
        return naive_families.norm(self.config, weight, hidden)

    def _heads(self, layer: int, letter: str, hidden: Tensor) -> Tensor:
        """Projected and normed, not rotated: ``(B, heads, T, D)``."""
        projected = self._linear(layer, f"self_attn.{letter}_proj", hidden)
        norm = self._weight(layer, f"self_attn.{letter}_norm.weight")
        if norm is not None and norm.numel() == projected.shape[-1]:  # OLMo2: over all heads
            return self._norm(norm, projected).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        return self._norm(norm, projected.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2))

    def _rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        angles = positions.double()[:, None] * self.frequencies
        left, right = heads.chunk(2, -1)
        cos, sin = angles.cos() * self.amplitude, angles.sin() * self.amplitude
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def _own(self, layer: int, hidden: Tensor, first: KeyValue | None) -> KeyValue:
        """Keys and values of an owner; of YOCO++ a mix with those of layer 0, 35 times the learned numbers."""
        states = []
        owned = (("k", layer in self.keys, "key_mix"), ("v", layer in self.values, "value_mix"))
        for index, (letter, owns, mix) in enumerate(owned):
            state = self._heads(layer, letter, hidden) if owns else hidden.new_zeros(0)
            weights = self._weight(layer, f"self_attn.{mix}")
            if weights is not None:
                assert first is not None
                state = 35 * weights[0] * first[index] + 35 * weights[1] * state
            states.append(state)
        return states[0], states[1]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """Rotated queries and keys; ``visible (T_q, T_k)``; zeros where a token sees nothing."""
        groups = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = (query @ keys.mT * naive_families.score_scale(self.config)).masked_fill(~visible, -1e300)
        output = scores.softmax(-1) @ values if keys.shape[2] else torch.zeros_like(query)
        return output * visible.any(-1)[:, None]

    def _layer(self, layer: int, hidden: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """``attend`` turns what the layer's attention is given into heads ``(B, H, T, D)``."""
        before, after, feeding, fed = (
            self._weight(layer, f"{name}_layernorm.weight")
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        )
        heads = attend(self._norm(before, hidden))
        output = self._linear(layer, "self_attn.o_proj", heads.transpose(1, 2).flatten(2))
        if fed is not None:  # OLMo2 norms what comes out, and Gemma that too
            hidden = hidden + self._norm(after, output)
            return hidden + self._norm(fed, self._feed(layer, self._norm(feeding, hidden)))
        hidden = hidden + output
        return hidden + self._feed(layer, self._norm(after, hidden))

    def _feed(self, layer: int, hidden: Tensor) -> Tensor:
        if self._weight(layer, "mlp.gate.weight") is not None:
            return naive_experts(self.weights, f"model.layers.{layer}.mlp.", self.config, hidden)
        gate, up = (self._linear(layer, f"mlp.{name}_proj", hidden) for name in ("gate", "up"))
        return self._linear(layer, "mlp.down_proj", naive_families.activate(self.config, gate) * up)

    def _embed(self, ids: Tensor) -> Tensor:
        return naive_families.embed(self.config, self.weights["model.embed_tokens.weight"], ids)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self._norm(self.weights["model.norm.weight"], hidden) @ head.T

    # Token by token.

    def sequential(self, ids: Tensor, sink: int = 0, recent: int = 10**9) -> Tensor:
        """Logits ``(B, T, V)``, one token after another.

        Args:
            ids: ``(B, T)``.
            sink: First tokens that are kept.
            recent: Latest tokens that are kept, the current one included; whatever is kept stands side by side.
        """
        held: list[dict[int, KeyValue]] = [{} for _ in self.keys]  # of a layer, by token
        logits = []
        for token in range(ids.shape[1]):
            kept = [past for past in range(token + 1) if past < sink or past > token - recent]
            hidden = self._embed(ids[:, token : token + 1])
            for layer in range(len(self.keys)):
                hidden = self._layer(layer, hidden, partial(self._step, layer, kept, held))
            logits.append(self._logits(hidden))
        return torch.cat(logits, 1)

    def _step(self, layer: int, kept: list[int], held: list[dict[int, KeyValue]], normed: Tensor) -> Tensor:
        token, query = kept[-1], self._heads(layer, "q", normed)
        query = self._rotate(query, torch.tensor([len(kept) - 1]))
        if layer in self.keys or layer in self.values:
            held[layer][token] = self._own(layer, normed, held[0].get(token))
        places = [
            (place, past)
            for place, past in enumerate(kept)
            if len(kept) - place <= self.window[layer] and not (self.closed[layer] and past == token)
        ]
        if not places:
            return torch.zeros_like(query)
        keys = torch.cat([held[self.keys[layer]][past][0] for _, past in places], 2)
        values = torch.cat([held[self.values[layer]][past][1] for _, past in places], 2)
        keys = self._rotate(keys, torch.tensor([place for place, _ in places]))
        return self._attend(query, keys, values, torch.ones(1, len(places), dtype=torch.bool))

    # Pass by pass.

    def parallel(self, ids: Tensor, free: int, graded: int, stale: bool = False) -> Tensor:
        """Logits ``(B, T, V)`` after ``free`` passes without gradient and ``graded`` ones with.

        Nothing is spared: every pass runs every layer of its stage, from keys and values that are zero.

        Args:
            ids: ``(B, T)``.
            free: m.
            graded: b.
            stale: Readers of a stage's targets see those of the pass before, the targets themselves included.
        """
        hidden, final = self._embed(ids), {}
        for layers, targets in self._stages():
            passes = (free, graded) if targets else (0, 1)
            hidden, fresh, before = self._passes(layers, targets, hidden, final, passes, stale, {})
            final.update(fresh)
            if stale:
                final.update({target: before[target] for target in targets})
        return self._logits(hidden)

    def blocks(self, ids: Tensor, passes: int, block: int, stale: bool = False) -> Tensor:
        """Logits ``(B, T, V)`` of a prompt that is read ``block`` tokens at a time.

        What a block's last pass made stays as it is while later blocks iterate over it; their own tokens see that
        alone in their first pass.
        """
        hidden, final = self._embed(ids), {}
        for layers, targets in self._stages():
            if not targets:
                hidden, fresh, _ = self._passes(layers, targets, hidden, final, (0, 1), stale, {})
                final.update(fresh)
                continue
            outputs, held = [], {}
            for begin in range(0, ids.shape[1], block):
                end = begin + block
                below = {layer: (key[:, :, :end], value[:, :, :end]) for layer, (key, value) in final.items()}
                output, held, _ = self._passes(layers, targets, hidden[:, :end], below, (0, passes), stale, held)
                outputs.append(output[:, begin:])
            hidden = torch.cat(outputs, 1)
            final.update(held)
        return self._logits(hidden)

    def _stages(self) -> list[tuple[range, set[int]]]:
        """Layers that run together, and which of them are read from below."""
        stages, layer = [], 0
        while layer < len(self.keys):
            last = layer
            while max(self.keys[layer : last + 1]) > last:
                last = max(self.keys[layer : last + 1])
            layers = range(layer, last + 1)
            stages.append((layers, {self.keys[reader] for reader in layers if self.keys[reader] > reader}))
            layer = last + 1
        return stages

    def _passes(
        self,
        layers: range,
        targets: set[int],
        start: Tensor,
        final: dict[int, KeyValue],
        passes: tuple[int, int],
        stale: bool,
        held: dict[int, KeyValue],
    ) -> tuple[Tensor, dict[int, KeyValue], dict[int, KeyValue]]:
        """The last pass' output and keys and values, and those of the pass before; ``held`` ones stay."""
        shape = (start.shape[0], self.config.num_key_value_heads, start.shape[1], self.config.head_dim)
        zeros = start.new_zeros(shape)
        fresh, hidden = {layer: held.get(layer, (zeros, zeros)) for layer in layers}, start
        for index in range(sum(passes)):
            before, fresh, hidden = fresh, {}, start
            with torch.set_grad_enabled(index >= passes[0] and torch.is_grad_enabled()):
                for layer in layers:
                    late = {target for target in targets if stale or target > layer}
                    read = {**final, **fresh, **{target: before[target] for target in late}}
                    hidden = self._layer(layer, hidden, partial(self._all, layer, read, fresh, late, held))
        return hidden, fresh, before

    def _all(
        self,
        layer: int,
        read: dict[int, KeyValue],
        fresh: dict[int, KeyValue],
        late: set[int],
        held: dict[int, KeyValue],
        normed: Tensor,
    ) -> Tensor:
        positions = torch.arange(normed.shape[1])
        if layer in self.keys or layer in self.values:
            fresh[layer] = _after(held.get(layer), self._own(layer, normed, read.get(0)))
            read = read if layer in late else {**read, layer: fresh[layer]}
        distance = positions[:, None] - positions
        visible = (distance >= int(self.closed[layer])) & (distance < self.window[layer])
        query = self._rotate(self._heads(layer, "q", normed), positions)
        keys, values = read[self.keys[layer]][0], read[self.values[layer]][1]
        keys = self._rotate(keys, positions[: keys.shape[2]])
        return self._attend(query, keys, values, visible[:, : keys.shape[2]])


def _after(held: KeyValue | None, new: KeyValue) -> KeyValue:
    """New keys and values, those of the first tokens as they are held."""
    if held is None:
        return new
    return tuple(torch.cat([old, late[:, :, old.shape[2] :]], 2) for old, late in zip(held, new, strict=True))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean loss of the next token."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
