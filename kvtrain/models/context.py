"""What layers must know of a forward pass: one object, made and checked before the pass begins."""

from collections import UserDict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import torch
import transformers
from torch import Tensor

from kvtrain.cache.base import KVCache
from kvtrain.cache.layer import KVCacheLayer
from kvtrain.errors import unknown
from kvtrain.kernels.context_parallel import WHOLE_ROWS, ContextParallel
from kvtrain.kernels.documents import Documents
from kvtrain.kernels.memo import Memo
from kvtrain.models.compat import CACHE, NEWEST_TESTED, OLDEST_TESTED, rename_cache
from kvtrain.models.ordering import padding_first, take_tokens
from kvtrain.models.recording import RecordedStates

_POSITIONAL = ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", "use_cache")
# What every decoder understands, and what says how its input belongs together: of flash-attention's four names
# ``cu_seq_lens_q`` says it all.
_DECODER = {*_POSITIONAL, "output_hidden_states", "output_attentions", "return_dict", "context"}
_DECODER |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
_OURS = {"document_ids", "prefill", "step", "outputs"}
# What tokenizers, collators, trainers and `generate` add, and these models have no use for: hosts leave it unread, too.
_UNREAD = {
    "tokenizer",
    "assistant_tokenizer",
    "token_type_ids",
    "cache_position",
    "output_router_logits",
    "seq_idx",
}


class PassOptions(TypedDict, total=False):
    """What a forward pass knows besides what every host does.

    Attributes:
        prefill: With a cache: even a single token a row is part of a prompt, cut anywhere; or ``(B,)``, of which rows
            that holds.
        step: What a training step says to the method's attention, such as a ``DMCStep``.
        outputs: Receives what layers hand out by the layer's number, such as DMC's decisions ``(B, H_kv, T)``: a
            ``LayerOutputs``, or any other mapping.
        output_hidden_states: As the host's.
        return_dict: As the host's.
    """

    prefill: bool | Tensor | None
    step: Any
    outputs: MutableMapping[int, Any] | None
    output_hidden_states: bool | None
    return_dict: bool | None


class LayerOutputs(UserDict[int, Any]):
    """What layers hand out beside hidden states, by the layer's number.

    No plain ``dict``, of which FSDP2 gives layers copies.
    """


@dataclass(frozen=True, eq=False)
class ForwardContext(Memo):
    """What one forward pass is about; hosts hand it to every layer as the keyword ``context``.

    Where ranks share rows, all of it is about whole rows; hidden states alone are parts.

    Attributes:
        positions: ``(B or 1, T)`` of each token within its document.
        documents: Of a pass without a cache, ``(B, T)``, 0 for padding; None: every row is one document, and all of it
            is real.
        counted: Whether every row's tokens are known to stand at positions 0, 1, 2, ..., none of them padding.
        cache: The model's, which the tokens enter; None without one.
        valid: ``(B, n)`` real tokens, with a cache; in every row the padding stands before them.
        order: ``(B, n)`` in which the caller sent them, with a cache, or None where that is this one.
        prefill: ``(B,)`` rows whose tokens are part of a prompt, with a cache; a single token may be its last chunk.
        decodes: Whether every row goes on by a single token, with a cache, and none of them reads a prompt.
        single: Whether every row has exactly one token, a real one, with a cache; as far as is known.
        step: What training says to the method's attention in this step, such as a ``DMCStep``.
        outputs: Receives what layers hand out beside hidden states, by the layer's number; what that is, a method says.
        recorded: Receives what enters layers, for stacks that record hidden states by themselves.
        parallel: Ranks that share the rows.
    """

    positions: Tensor
    documents: Documents | None = None
    counted: bool = False
    cache: KVCache | None = None
    valid: Tensor | None = None
    order: Tensor | None = None
    prefill: Tensor | None = None
    decodes: bool = False
    single: bool = False
    step: Any = None
    outputs: MutableMapping[int, Any] | None = None
    recorded: RecordedStates | None = None
    parallel: ContextParallel = WHOLE_ROWS
    _visited: set[int] = field(default_factory=set, init=False)

    def cache_layer(self, layer_idx: int) -> KVCacheLayer:
        """The cache of one layer."""
        assert self.cache is not None
        self._visited.add(layer_idx)
        return self.cache.layers[layer_idx]

    def cache_layers(self) -> list[KVCacheLayer]:
        """The cache of all layers, for stacks that read it as a whole."""
        assert self.cache is not None
        self._visited.update(range(len(self.cache.layers)))
        return self.cache.layers

    @property
    def real(self) -> Tensor | None:
        """``(B, T)`` tokens that are no padding, in the order in which layers see them; None where all are."""
        if self.valid is not None:
            return self.valid
        return None if self.documents is None else self.documents.queries > 0

    def entering(self) -> Documents:
        """Of the tokens that enter the cache: real ones belong together, and so does padding."""
        assert self.valid is not None
        valid = self.valid
        return self.keep("entering", lambda: Documents(valid.long()))

    def to(self, device: torch.device | str | int, *_: Any, **__: Any) -> "ForwardContext":
        """The same for layers that run on another device; accelerate's hooks ask everything that has a ``to``."""
        device = torch.device(device)
        here = self.positions.device
        if here.type == device.type and device.index in (None, here.index):
            return self
        return self.keep(("on", device), lambda: self._on(device))

    def _on(self, device: torch.device) -> "ForwardContext":
        tensors = {name: getattr(self, name) for name in ("positions", "valid", "order", "prefill")}
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()
        }
        documents = None if self.documents is None else Documents(self.documents.queries.to(device))
        other = replace(self, documents=documents, **moved)
        object.__setattr__(other, "_visited", self._visited)  # one cache, whoever looks at it
        return other

    def leave(self, output: Any) -> Any:
        """Count the tokens that went into the cache, and give a decoder's outputs back in the caller's order.

        Raises:
            RuntimeError: No layer has looked at the cache.
        """
        if self.cache is None:
            return output
        if not self._visited:
            raise RuntimeError(
                f"transformers {transformers.__version__} did not hand the cache to any layer, and what came out is "
                f"wrong; install transformers {OLDEST_TESTED} to {NEWEST_TESTED}, or pass use_cache=False"
            )
        assert self.valid is not None
        self.cache.advance(self.valid, None if self.decodes else self.prefill)
        return output if self.order is None else _reorder(output, self.order)


def named_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decoder's arguments by name.

    Raises:
        ValueError: One that no decoder here reads, and that would be left out without a word.
    """
    named = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
    rename_cache(named)
    for name, value in named.items():
        if value is not None and name not in _DECODER | _OURS | _UNREAD:
            known = [*_POSITIONAL, "output_hidden_states", *sorted(_OURS)]
            raise ValueError(unknown("argument of the forward pass", name, known, f"It has {', '.join(known)}"))
    return named


def packed_documents(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Documents ``(B, T)`` of a forward pass whose rows are packed, 0 for padding; None where they are not.

    Callers say so by ``document_ids``, by flash-attention's ``cu_seq_lens_q`` (rows laid end to end) or, as everywhere
    in transformers, by ``position_ids``: a position of 0 after a row's first real token begins a document.

    Args:
        kwargs: The decoder's arguments.
    """
    documents: Tensor | None = kwargs.get("document_ids")
    positions: Tensor | None = kwargs.get("position_ids")
    mask, edges = kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_q")
    if documents is None and positions is not None:
        starts = _document_starts(positions, mask)
        documents = 1 + starts.cumsum(-1) if bool(starts.any()) else None
    elif documents is None and edges is not None:
        tokens = torch.arange(int(edges[-1]), device=edges.device)
        documents = 1 + torch.bucketize(tokens, edges[1:], right=True)[None]
    if documents is None:
        return None
    documents = documents.expand(_tokens(kwargs).shape[:2])
    return documents if mask is None else documents * mask.to(documents.dtype)


def _tokens(kwargs: Mapping[str, Any]) -> Tensor:
    """The input, ``(B, n)`` or ``(B, n, hidden)``."""
    tokens: Tensor = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    return tokens


def _document_starts(position_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens ``(B, n)`` at which a document begins inside its row, given its real tokens ``(B, n)``."""
    real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask.bool()
    return (position_ids == 0) & real & (real.cumsum(-1) > 1)


def check_cache(cache: Any, training: bool, parallel: ContextParallel) -> None:
    """Refuse caches that cannot be honoured.

    Raises:
        ValueError: A foreign cache, or a cache together with training or with rows that ranks share.
    """
    if not isinstance(cache, KVCache):
        raise ValueError(f"{type(cache).__name__} does not fit this model; use model.make_cache(), or none")
    if training:
        raise ValueError("training has no cache; call model.eval() or pass use_cache=False")
    if parallel.size > 1:
        raise ValueError("a cache holds whole rows, and ranks share this model's; pass use_cache=False")


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions ``(B, T)`` within the documents ``(B, T)``, each of which is a run of its row."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def parallel_context(
    kwargs: Mapping[str, Any], packed: Tensor | None, parallel: ContextParallel = WHOLE_ROWS
) -> ForwardContext:
    """What a forward pass without a cache is about.

    Args:
        kwargs: The decoder's arguments.
        packed: What ``packed_documents`` found among them.
        parallel: Ranks that share the rows, all of which the arguments are about.

    Raises:
        ValueError: ``attention_mask`` is no padding mask.
    """
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}; pass the padding mask (rows, tokens)")
    documents = mask.long() if packed is None and mask is not None else packed
    documents = None if documents is None else _unless_alone(documents)
    counted = positions is None and documents is None
    if positions is None and packed is not None:
        positions = document_positions(packed)
    elif positions is None and mask is not None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    elif positions is None:
        positions = torch.arange(_tokens(kwargs).shape[1], device=_tokens(kwargs).device)[None]
    found = Documents.of(documents)
    return ForwardContext(positions, found, counted=counted, parallel=parallel, **_handed_on(kwargs))


def _unless_alone(documents: Tensor) -> Tensor | None:
    """None where every row is a single document; on an accelerator asking would cost more than it saves."""
    if documents.device.type != "cpu" or not bool(((documents == documents[:, :1]) & (documents > 0)).all()):
        return documents
    return None


def cache_context(kwargs: dict[str, Any], cache: KVCache) -> ForwardContext:
    """What a forward pass over a cache is about; moves padding of the arguments to the front, in place.

    Args:
        kwargs: The decoder's arguments. ``attention_mask (B, past + n)`` may also cover the new tokens alone.
        cache: Its cache.

    Raises:
        ValueError: Rows or mask do not fit, or rows are packed.
        CacheFullError: The new tokens may not fit into the budget.
    """
    tokens = _tokens(kwargs)
    batch, length = tokens.shape[:2]
    mask = kwargs.get("attention_mask")
    valid = _valid_tokens(mask, batch, length, tokens.device)
    whole = mask is None or (length == 1 and bool(valid.all()))
    positions, packed = kwargs.get("position_ids"), kwargs.get("document_ids") is not None
    if packed or (length > 1 and positions is not None and bool(_document_starts(positions, valid).any())):
        raise ValueError(
            "packed rows (document_ids, or a position of 0 inside a row) have no cache; "
            "pass one document a row, or use_cache=False"
        )
    prefill, reads = _prefill(kwargs.get("prefill"), valid)
    cache.prepare(batch, length, answers=lambda: valid.any(1) & ~prefill)
    if positions is None and whole:
        positions = cache.tokens[:, None] + torch.arange(length, device=tokens.device)
    elif positions is None:
        positions = (cache.tokens[:, None] + valid.cumsum(-1) - 1).clamp(min=0)
    restore = None
    if not whole and length > 1 and bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        order = padding_first(valid)
        valid, restore = valid.gather(1, order), order.argsort(1)
        positions = positions.expand(valid.shape).gather(1, order)
        for name in ("input_ids", "inputs_embeds"):
            if kwargs.get(name) is not None:
                kwargs[name] = take_tokens(kwargs[name], order)
    return ForwardContext(
        positions,
        cache=cache,
        valid=valid,
        order=restore,
        prefill=prefill,
        decodes=length == 1 and not reads,
        single=length == 1 and whole,
        **_handed_on(kwargs),
    )


def _handed_on(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a context carries as the caller gave it."""
    return {name: kwargs.get(name) for name in ("step", "outputs", "recorded")}


def _prefill(said: bool | Tensor | None, valid: Tensor) -> tuple[Tensor, bool]:
    """Rows ``(B,)`` that read a prompt, and whether any may.

    They are those that send several tokens, and those of which the caller says so.
    """
    several = valid.shape[1] > 1
    if isinstance(said, Tensor):
        new = valid.sum(1)
        reads = (new > 1) | (said.to(new.device) & (new > 0))
        return reads, several or bool(reads.any())
    if not several:
        return valid[:, 0] & bool(said), bool(said)
    new = valid.sum(1)
    return new > 0 if said else new > 1, True


def _reorder(output: Any, order: Tensor) -> Any:
    """Every tensor ``(B, n, ...)`` of a decoder's output in the order ``(B, n)``."""
    if isinstance(output, Tensor):
        return take_tokens(output, order)
    if isinstance(output, tuple):
        return tuple(_reorder(part, order) for part in output)
    if isinstance(output, Mapping):
        for name, part in output.items():
            output[name] = _reorder(part, order)  # type: ignore[index]
    return output


def _valid_tokens(attention_mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Which of the new tokens are real, ``(B, n)`` bool."""
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}; pass the padding mask (rows, past + new tokens), "
            f"of {batch} rows and at least {length} columns"
        )
    return attention_mask[:, -length:].bool()
