"""kvpress' presses where a model of kvtrain is expected: a plain model whose prompts a press cuts when they end.

kvpress asks for an older transformers than kvtrain does, so that it is installed without what it depends on, and it
patches attention for the whole process: what is measured with it is measured in a process of its own::

    pip install "cachetools<6" "fire<0.7" requests peft six termcolor pandas
    pip install --no-deps kvpress==0.5.5
    python benchmarks/policies.py --kvpress

Its hooks read a keyword that transformers no longer passes, ``cache_position``; given by hand, it arrives. They know
neither padding nor chunks: a prompt is read in one pass, and by itself unless all prompts are equally long.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from kvtrain.data.tokenizer import resolve

_MASK = "masked_key_indices"  # what a press leaves on modules where it masks and frees nothing

# A press by the share of a prompt's tokens that it drops; settings as in benchmarks/policies.py.
PRESSES: dict[str, Callable[[Any, float], Any]] = {
    "kvpress StreamingLLM": lambda kvpress, dropped: kvpress.StreamingLLMPress(dropped),
    "kvpress TOVA": lambda kvpress, dropped: kvpress.TOVAPress(dropped),
    "kvpress SnapKV": lambda kvpress, dropped: kvpress.SnapKVPress(dropped, window_size=32),
    "kvpress Ada-KV": lambda kvpress, dropped: kvpress.AdaKVPress(kvpress.SnapKVPress(dropped, window_size=32)),
    "kvpress ExpectedAttention": lambda kvpress, dropped: kvpress.ExpectedAttentionPress(dropped, epsilon=0.02),
}


class PressedModel:
    """A packaged model, and a press.

    Args:
        base: Name of the model.
        arm: One of ``PRESSES``.
        dropped: Share of a prompt's tokens that leave.

    Attributes:
        masks: Whether what the press has dropped is masked somewhere, and not freed.
    """

    def __init__(self, base: str, arm: str, dropped: float) -> None:
        import kvpress

        self.model = AutoModelForCausalLM.from_pretrained(resolve(base), dtype=torch.bfloat16).eval()
        self.press, self.masks = PRESSES[arm](kvpress, dropped), False
        self.config, self.dtype = SimpleNamespace(host_config=self.model.config), self.model.dtype
        self.device, self.get_output_embeddings = self.model.device, self.model.get_output_embeddings

    def make_cache(self) -> "PressedCache":
        """See ``kvtrain.models.language_model``."""
        return PressedCache(self)

    def get_decoder(self) -> Callable[..., Any]:
        """See ``transformers``."""
        return self._read

    def _read(self, ids: Tensor, attention_mask: Tensor, past_key_values: "PressedCache", prefill: bool = False) -> Any:
        """Hidden states ``(B, n, D)`` of ids ``(B, n)``; zeros where they are padding."""
        hidden = torch.zeros(*ids.shape, self.model.config.hidden_size, dtype=self.dtype)
        real = attention_mask.bool()
        for rows, part in past_key_values.parts(real):
            columns = real[rows][0]
            if columns.any():
                hidden[rows, columns] = part.read(ids[rows][:, columns])
        return SimpleNamespace(last_hidden_state=hidden)


class PressedRows:
    """Rows that are equally long: their prompts in a plain cache until they end, and then what the press has left."""

    def __init__(self, owner: PressedModel, count: int) -> None:
        self._owner, self._decoder = owner, owner.model.model
        self.ids, self.cache = torch.empty(count, 0, dtype=torch.long), DynamicCache()
        self.marks: list[Any] = [None] * len(self._decoder.layers)

    def read(self, ids: Tensor) -> Tensor:
        """Hidden states ``(B, n, D)`` of further tokens ``(B, n)``."""
        positions = torch.arange(ids.shape[1]) + self.ids.shape[1]
        self.ids = torch.cat([self.ids, ids], 1)
        for layer, mark in zip(self._decoder.layers, self.marks, strict=True):  # in place of other rows'
            setattr(layer.self_attn, _MASK, mark)
        kwargs = {"past_key_values": self.cache, "position_ids": positions[None], "cache_position": positions}
        hidden: Tensor = self._decoder(input_ids=ids, **kwargs).last_hidden_state
        return hidden

    def cut(self) -> None:
        """Read the prompts anew, all of them in one pass, under the press."""
        self.cache = DynamicCache()
        with self._owner.press(self._owner.model):
            self._decoder(self.ids, past_key_values=self.cache, cache_position=torch.arange(self.ids.shape[1]))
        self.marks = [getattr(layer.self_attn, _MASK, None) for layer in self._decoder.layers]
        self._owner.masks |= any(mark is not None for mark in self.marks)

    def held_bytes(self) -> int:
        """Bytes of keys and values."""
        layers: list[Any] = self.cache.layers
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in layers)


class PressedCache:
    """What evaluation asks of a cache, of rows that do not know of each other."""

    cuts_prompts = True

    def __init__(self, model: PressedModel) -> None:
        self._model, self._parts = model, dict[tuple[int, int], PressedRows]()

    def parts(self, real: Tensor) -> list[tuple[slice, PressedRows]]:
        """Rows that are read together; all of them where the first pass, whose mask is given, pads none."""
        if not self._parts:
            size = len(real) if real.all() else 1
            for begin in range(0, len(real), size):
                self._parts[begin, begin + size] = PressedRows(self._model, size)
        return [(slice(*bounds), part) for bounds, part in self._parts.items()]

    def end_prompt(self) -> None:
        """See ``KVCache``."""
        for part in self._parts.values():
            part.cut()

    @property
    def num_rows(self) -> int:
        """See ``KVCache``."""
        return max(end for _, end in self._parts)

    @property
    def tokens(self) -> Tensor:
        """See ``KVCache``."""
        return self._by_row(lambda part: part.ids.shape[1])

    def mean_kv_tokens(self) -> Tensor:
        """See ``KVCache``."""
        return self._by_row(lambda part: part.cache.get_seq_length())

    def _by_row(self, length: Callable[[PressedRows], int]) -> Tensor:
        return torch.tensor([length(part) for part in self._parts.values() for _ in range(len(part.ids))])

    def held_bytes(self) -> int:
        """See ``KVCache``."""
        return sum(part.held_bytes() for part in self._parts.values())

    kv_bytes = held_bytes

    def free_bytes(self) -> int:
        """See ``KVCache``."""
        return 0
