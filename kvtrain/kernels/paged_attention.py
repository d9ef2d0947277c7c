"""Attention over keys and values that lie on pages, without a dense copy of them.

Every page is attended by itself, where it lies, and the partial results are merged by their log-sum-exp: few
queries read each page once (flash decoding with a page as the split), whatever length each head has. Where many
queries share the pages, runs of pages are copied instead, a bounded number at a time.

Three ways, because each is wrong where another is right:

* *in place*, for a few queries: one call over all pages of the pool as its batch. Gathering the keys first, dense, cost
  more than the attention, which at one query a head does no more than read them. Results are ``(pages, Q, D)``, so the
  merge grows with the queries. Where other rows own most of the pool, the pages of these rows alone are copied;
* *by runs*, for more queries than a page has slots: a copy is cheap beside products of so many, and long runs keep the
  merge small. Heads too short for a run take no part in it;
* *dequantized*, for quantized pages: they must be copied anyway, into a scratch that stays in a processor's cache.

No gradient flows into pages: a cache holds constants.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvtrain.kernels.attention import attention, check_groups, merge_attention
from kvtrain.kernels.attention_mask import finite, log_sum_exp
from kvtrain.kernels.dispatch import at_least_float32, choose_backend
from kvtrain.kernels.flash_cpu import flash
from kvtrain.kernels.page_layout import Hidden, PageLayout
from kvtrain.kernels.quantization import dequantize, packed_channels

_RUN_SLOTS = 1024  # slots of one head that are copied at a time
_SCRATCH_BYTES = 4 * 2**20  # of dequantized keys and values at a time, unless a single run takes more


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    bits: int | None = None,
    layout: PageLayout | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Let every query see the first ``lengths`` slots of its row and head.

    Args:
        query: ``(B, H, n, D)``.
        keys: ``(pages, page_size, D)``, or with ``bits`` what ``quantize`` makes of that.
        values: ``(pages, page_size, D_v)``, likewise.
        table: ``(B, H_kv, P)`` pages of each head in order, -1 where there is none; no page has two owners.
        lengths: ``(B, H_kv)`` visible slots.
        scale: Factor on the scores.
        bits: 8 or 4, of quantized keys and values.
        layout: Of ``table.flatten(0, 1)``, from a caller that keeps it for as long as the table stays the same.
        backend: ``"auto"``, ``"flash_cpu"`` or ``"chunked"``, for each page's or run's own attention.

    Returns:
        Output ``(B, H, n, D_v)`` and log-sum-exp ``(B, H, n)``; zeros and ``-inf`` where nothing is visible.

    Raises:
        ValueError: Head counts or bits do not fit, or the backend cannot run this call.
    """
    batch, heads, num_queries, dim = query.shape
    check_groups(heads, table.shape[1])
    if not query.numel():
        return query.new_zeros(batch, heads, num_queries, _Pages(keys, values, bits).value_dim), _nothing(query)
    if bits is None and torch.is_grad_enabled() and query.requires_grad:
        keys, values = keys.clone(), values.clone()  # the pages are written again before a backward pass comes
    # The queries of one key-value head side by side: (B * H_kv, G * n, D).
    grouped = query.reshape(batch * table.shape[1], -1, dim)
    pages = _Pages(keys, values, bits)
    if grouped.shape[1] > pages.size:
        output, lse = _attend_runs(grouped, pages, table.flatten(0, 1), lengths.flatten(), scale, backend)
    else:
        layout = layout or PageLayout(table.flatten(0, 1), pages.num_pages, pages.size, copies=bits is not None)
        attend = _attend_in_place if bits is None else _attend_dequantized
        output, lse = attend(grouped, pages, layout, lengths, scale, backend)
    return output.reshape(batch, heads, num_queries, -1), lse.reshape(batch, heads, num_queries)


class _Pages(NamedTuple):
    """Keys and values on pages.

    Attributes:
        keys: ``(pages, page_size, D)``, or packed.
        values: ``(pages, page_size, D_v)``, or packed.
        bits: Of packed ones.
    """

    keys: Tensor
    values: Tensor
    bits: int | None

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.keys.shape[0]

    @property
    def size(self) -> int:
        """Slots in a page."""
        return self.keys.shape[1]

    @property
    def value_dim(self) -> int:
        """Channels of a value, D_v."""
        width = self.values.shape[2]
        return width if self.bits is None else packed_channels(width, self.bits)

    def copy_runs(self, pages: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``(N, S, D)`` and values of runs of ``pages (N, columns)``, for queries ``(..., D)``."""
        if self.bits is None:
            return self.keys[pages].flatten(1, 2), self.values[pages].flatten(1, 2)
        keys, values = (
            # Whole pages at a time: indexing would copy byte by byte.
            slots.index_select(0, pages.flatten()).unflatten(0, pages.shape).flatten(1, 2)
            for slots in (self.keys, self.values)
        )
        key = dequantize(keys, self.bits, query.shape[-1], query.dtype)
        return key, dequantize(values, self.bits, self.value_dim, query.dtype)


def _attend_in_place(
    query: Tensor, pages: _Pages, layout: PageLayout, lengths: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """All pages at once: ``query (R, Q, D)``, ``lengths (B, H_kv)``."""
    keys, values, shown = pages.keys, pages.values, layout.shown(lengths)
    if layout.pages is not None:
        keys, values = keys[layout.pages], values[layout.pages]
    if not len(keys):
        return query.new_zeros(*query.shape[:2], pages.value_dim), _nothing(query)
    attend = _attend_by_formula if layout.fixed and torch.compiler.is_compiling() else _attend_blocks
    output, lse = attend(query[layout.owner], keys, values, shown.hidden, scale, backend)
    return _merge(output, lse, layout.order, shown.empty)


def _attend_dequantized(
    query: Tensor, pages: _Pages, layout: PageLayout, lengths: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """So many quantized pages at a time as the scratch holds; arguments as above."""
    assert layout.pages is not None
    if not len(layout.pages):
        return query.new_zeros(*query.shape[:2], pages.value_dim), _nothing(query)
    wide, shown = torch.promote_types(query.dtype, torch.float32), layout.shown(lengths)
    count = max(1, _SCRATCH_BYTES // (pages.size * (query.shape[2] + pages.value_dim) * wide.itemsize))
    work = (tensor.split(count) for tensor in (query[layout.owner], layout.pages, shown.hidden.slots))
    parts = [
        _attend_blocks(some, *pages.copy_runs(number[:, None], some), Hidden(hidden), scale, backend)
        for some, number, hidden in zip(*work, strict=True)
    ]
    output, lse = (torch.cat(part) for part in zip(*parts, strict=True))
    return _merge(output, lse, layout.order, shown.empty)


def _merge(output: Tensor, lse: Tensor, order: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Join parts ``output (N, Q, D_v)`` and ``lse (N, Q)``: those of head ``r`` are ``order[r]``, unless ``empty``.

    Args:
        output: Of every part.
        lse: Of every part.
        order: ``(R, P)`` parts of each head.
        empty: ``(R, P, 1)`` parts that show nothing, and do not count.
    """
    lse = lse[order].masked_fill(empty, float("-inf"))  # (R, P, Q)
    total = log_sum_exp(lse, 1) if lse.requires_grad else torch.logsumexp(lse, 1)
    weights = torch.exp(lse - finite(total).unsqueeze(1)).unsqueeze(-1)
    return (weights * at_least_float32(output)[order]).sum(1).to(output.dtype), total


def _attend_runs(
    query: Tensor, pages: _Pages, table: Tensor, lengths: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Some columns of the table at a time, for those heads that are as long; arguments as above."""
    columns = max(1, _RUN_SLOTS // pages.size)
    lse = _nothing(query)
    output = lse.new_zeros(*query.shape[:2], pages.value_dim)  # wide: it is rounded once, not after every run
    for begin in range(0, table.shape[1], columns):
        left = lengths - begin * pages.size
        rows = (left > 0).nonzero().squeeze(1)  # lengths may differ much, by head and by row
        block = pages.copy_runs(table[rows, begin : begin + columns].clamp(min=0), query)
        part = _attend_blocks(query[rows], *block, Hidden.behind(left[rows], block[0]), scale, backend)
        # Merged at once: outputs of all runs would outgrow the keys where queries are more than a run has slots.
        merged = merge_attention([(output[rows, None], lse[rows, None]), (part[0][:, None], part[1][:, None])])
        output[rows], lse[rows] = merged[0].squeeze(1), merged[1].squeeze(1)
    return output.to(query.dtype), lse


def _attend_blocks(
    query: Tensor, keys: Tensor, values: Tensor, hidden: Hidden, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Independent attentions: ``query (N, Q, D)`` over those of ``keys (N, S, D)`` that are not hidden."""
    plain = query.device.type == "cpu" and query.dtype != torch.float16 and keys.shape == values.shape
    # torch's kernel has no gradient of its log-sum-exp, by which parts are merged.
    fast = ["flash_cpu"] if plain and not (torch.is_grad_enabled() and query.requires_grad) else []
    chosen = choose_backend("paged attention", backend, (*fast, "chunked"))
    query, keys, values = query.unsqueeze(1), keys.unsqueeze(1).to(query.dtype), values.unsqueeze(1).to(query.dtype)
    if chosen == "flash_cpu":
        mask = hidden.bias(query.dtype)[:, None, None].expand(-1, -1, query.shape[2], -1)
        output, lse = flash(query, keys, values, causal=False, mask=mask, scale=scale)
    else:
        bias = hidden.bias(torch.promote_types(query.dtype, torch.float32)).unsqueeze(1)
        output, lse = attention(query, keys, values, key_bias=bias, causal=False, scale=scale, backend="chunked")
    return output.squeeze(1), lse.squeeze(1)


def _attend_by_formula(
    query: Tensor, keys: Tensor, values: Tensor, hidden: Hidden, scale: float, _: str
) -> tuple[Tensor, Tensor]:
    """As ``_attend_blocks``, for a compiler that makes one loop of it and of what copies the keys and values.

    Every product is written out, which is no loss for the few queries of a step: they read each key and value once.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide).unsqueeze(2) * keys.to(wide).unsqueeze(1)).sum(-1) * scale  # (N, Q, S)
    scores = scores.masked_fill(hidden.slots.unsqueeze(1), torch.finfo(wide).min)
    highest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    output = (weights.unsqueeze(-1) * values.to(wide).unsqueeze(1)).sum(2) / total
    return output.to(query.dtype), (highest + total.log()).squeeze(-1)


def _nothing(query: Tensor) -> Tensor:
    """The log-sum-exp of queries ``(..., D)`` that see no key."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.full(query.shape[:-1], float("-inf"), dtype=wide, device=query.device)
