"""Attention over keys and values that lie on pages, without a dense copy of them.

Every page is attended by itself, where it lies, and the partial results are merged by their log-sum-exp: few
queries read each page once (flash decoding with a page as the split), whatever length each head has. Where many
queries share the pages, runs of pages are copied instead, a bounded number at a time.

Two ways, because each is wrong where the other is right:

* *by pages*, for a few queries: one call over all pages of the pool as its batch. Gathering the keys first, dense, cost
  more than the attention, which at one query a head does no more than read them. Results are ``(pages, Q, D)``, so the
  merge grows with the queries. Where other rows own most of the pool, the pages of these rows alone are copied. Pages
  that must be widened or dequantized are copied into a scratch that stays in a processor's cache;
* *by runs*, for more queries than a page has slots: a copy is cheap beside products of so many, and long runs keep the
  merge small. Heads too short for a run take no part in it.

No gradient flows into pages: a cache holds constants.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvtrain.kernels.attention import attention, check_groups, merge_attention
from kvtrain.kernels.attention_mask import finite, log_sum_exp
from kvtrain.kernels.dispatch import at_least_float32, choose_backend
from kvtrain.kernels.flash_cpu import flash
from kvtrain.kernels.page_codec import PageCodec
from kvtrain.kernels.page_layout import Hidden, PageLayout
from kvtrain.kernels.page_runs import PageRuns

_SCRATCH_BYTES = 4 * 2**20  # of widened keys and values at a time, unless a single page takes more
_FEW = 4  # queries of a key-value head that two batched products serve faster than a fused kernel


def goes_by_pages(query: Tensor, table: Tensor, page_size: int) -> bool:
    """Whether ``paged_attention`` attends every page by itself, and has a use for a layout; arguments as there."""
    return query.shape[1] * query.shape[2] <= table.shape[1] * page_size


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    codec: PageCodec | None = None,
    layout: PageLayout | None = None,
    runs: PageRuns | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Let every query see the first ``lengths`` slots of its row and head.

    Args:
        query: ``(B, H, n, D)``.
        keys: ``(pages, page_size, D)``, or with ``codec`` bytes ``(pages, slots, width)`` that it opens.
        values: ``(pages, page_size, D_v)``, likewise.
        table: ``(B, H_kv, P)`` pages of each head in order, -1 where there is none; no page has two owners.
        lengths: ``(B, H_kv)`` visible slots; where a slot holds several tokens, visible tokens.
        scale: Factor on the scores.
        codec: How packed keys and values are read.
        layout: Of ``table.flatten(0, 1)``, from a caller that keeps it for as long as the table stays the same.
        runs: Of that and ``lengths.flatten()``, from a caller that attends these slots several times: by runs then,
            however few the queries are.
        backend: ``"auto"``, ``"bmm"``, ``"flash_cpu"`` or ``"chunked"``, for each page's or run's own attention.

    Returns:
        Output ``(B, H, n, D_v)`` and log-sum-exp ``(B, H, n)``; zeros and ``-inf`` where nothing is visible.

    Raises:
        ValueError: Head counts or the codec do not fit, or the backend cannot run this call.
    """
    batch, heads, num_queries, dim = query.shape
    check_groups(heads, table.shape[1])
    pages = _Pages(keys, values, codec)
    if not query.numel():
        return query.new_zeros(batch, heads, num_queries, pages.value_dim), _nothing(query)
    # The queries of one key-value head side by side: (B * H_kv, G * n, D).
    grouped = query.reshape(batch * table.shape[1], -1, dim)
    by_pages = runs is None and goes_by_pages(query, table, pages.size)
    chosen = choose_backend("paged attention", backend, _backends(grouped, pages, by_pages))
    if by_pages:
        if codec is None and torch.is_grad_enabled() and query.requires_grad:
            # The pages are written again before a backward pass comes.
            pages = pages._replace(keys=keys.clone(), values=values.clone())
        layout = layout or PageLayout(table.flatten(0, 1), pages.num_pages, pages.size, copies=codec is not None)
        output, lse = _attend_pages(grouped, pages, layout, lengths, scale, chosen)
    else:
        runs = runs or PageRuns(table.flatten(0, 1), lengths.flatten(), pages.size)
        output, lse = _attend_runs(grouped, pages, runs, scale, chosen)
    return output.reshape(batch, heads, num_queries, -1), lse.reshape(batch, heads, num_queries)


class _Pages(NamedTuple):
    """Keys and values on pages.

    Attributes:
        keys: ``(pages, page_size, D)``, or packed.
        values: ``(pages, page_size, D_v)``, or packed.
        codec: Of packed ones.
    """

    keys: Tensor
    values: Tensor
    codec: PageCodec | None

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.keys.shape[0]

    @property
    def size(self) -> int:
        """Tokens of a page."""
        return self.keys.shape[1] * (1 if self.codec is None else self.codec.slot_tokens)

    @property
    def value_dim(self) -> int:
        """Channels of a value, D_v."""
        width = self.values.shape[2]
        return width if self.codec is None else self.codec.value_dim(width)

    def read(self, where: Tensor | slice, query: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``(..., page_size, D)`` and values of the pages ``where (...)``, for queries ``(..., D)``."""
        if self.codec is None:
            return self.keys[where], self.values[where]
        assert isinstance(where, Tensor), "packed pages are copied"
        keys, values = (
            # Whole pages at a time: indexing would copy byte by byte.
            slots.index_select(0, where.flatten()).unflatten(0, where.shape)
            for slots in (self.keys, self.values)
        )
        key, value = self.codec.open(keys, values, query.dtype)
        if key.shape[-1] != query.shape[-1]:
            raise ValueError(
                f"queries have {query.shape[-1]} channels, and the keys on these pages {key.shape[-1]} by this codec; "
                "pass the one that packed them"
            )
        return key, value


class _Partial(NamedTuple):
    """Attentions over parts of the keys, to be merged.

    Attributes:
        output: ``(N, Q, D_v)``.
        lse: ``(N, Q)`` by which outputs are weighted: log-sum-exp, or with ``total`` the best score.
        total: ``(N, Q)`` sums of ``exp(score - lse)``, by which outputs are still to be divided; None for ones.
    """

    output: Tensor
    lse: Tensor
    total: Tensor | None = None


def _backends(query: Tensor, pages: _Pages, by_pages: bool) -> tuple[str, ...]:
    """Those that can run attentions of queries ``(R, Q, D)``, best first."""
    # Alone the chunked one has a gradient of its log-sum-exp, by which parts are merged.
    if query.device.type != "cpu" or query.dtype == torch.float16 or (torch.is_grad_enabled() and query.requires_grad):
        return ("chunked",)
    few = ("bmm",) if by_pages and query.shape[1] <= _FEW else ()
    return (*few, "flash_cpu", "chunked") if query.shape[2] == pages.value_dim else (*few, "chunked")


def _attend_pages(
    query: Tensor, pages: _Pages, layout: PageLayout, lengths: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Every page by itself: ``query (R, Q, D)``, ``lengths (B, H_kv)``."""
    if not len(layout.owner):
        return query.new_zeros(*query.shape[:2], pages.value_dim), _nothing(query)
    shown, dtype = layout.shown(lengths), query.dtype
    query = at_least_float32(query) if backend == "bmm" else query  # scores would be rounded
    by_formula = layout.fixed and torch.compiler.is_compiling()
    parts = [
        _attend_by_formula(*block, scale) if by_formula else _attend_blocks(*block, scale, backend)
        for block in _blocks(query, pages, layout, shown.hidden)
    ]
    output, lse = _merge(parts[0] if len(parts) == 1 else _joined(parts), layout.order, shown.empty)
    return output.to(dtype), lse


def _blocks(
    query: Tensor, pages: _Pages, layout: PageLayout, hidden: Hidden
) -> Iterator[tuple[Tensor, Tensor, Tensor, Hidden]]:
    """Queries, keys, values and what is hidden: all at once where they lie in the queries' dtype, or scratchfuls."""
    where = slice(None) if layout.pages is None else layout.pages
    if pages.codec is None and pages.keys.dtype == query.dtype:
        yield query[layout.owner], *pages.read(where, query), hidden
        return
    wide = torch.promote_types(query.dtype, torch.float32)
    size = max(1, _SCRATCH_BYTES // (pages.size * (query.shape[2] + pages.value_dim) * wide.itemsize))
    for begin in range(0, len(layout.owner), size):
        some = slice(begin, begin + size)
        keys, values = pages.read(some if layout.pages is None else layout.pages[some], query)
        yield query[layout.owner[some]], keys, values, Hidden(hidden.slots[some])


def _joined(parts: list[_Partial]) -> _Partial:
    output, lse = torch.cat([part.output for part in parts]), torch.cat([part.lse for part in parts])
    totals = [part.total for part in parts if part.total is not None]
    return _Partial(output, lse, torch.cat(totals) if totals else None)


def _merge(part: _Partial, order: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``(R, Q, D_v)`` and log-sum-exp of all: those of head ``r`` are ``order[r]``, unless ``empty``.

    Args:
        part: Of every page.
        order: ``(R, P)`` parts of each head.
        empty: ``(R, P, 1)`` parts that show nothing, and do not count.
    """
    lse = part.lse[order].masked_fill(empty, float("-inf"))  # (R, P, Q)
    if lse.requires_grad:
        sums = log_sum_exp(lse, 1)
        weights = torch.exp(lse - finite(sums).unsqueeze(1)).unsqueeze(-1)
        return (weights * at_least_float32(part.output)[order]).sum(1), sums
    best = lse.amax(1).clamp_(min=torch.finfo(lse.dtype).min)
    weights = lse.sub_(best.unsqueeze(1)).exp_()
    total = (weights if part.total is None else weights * part.total[order]).sum(1)
    output = (weights.unsqueeze(-1) * at_least_float32(part.output)[order]).sum(1)
    return output.div_(total.clamp(min=torch.finfo(lse.dtype).tiny).unsqueeze(-1)), best.add_(total.log_())


def _attend_runs(query: Tensor, pages: _Pages, runs: PageRuns, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Run after run; arguments as above."""
    lse = _nothing(query)
    output = lse.new_zeros(*query.shape[:2], pages.value_dim)  # wide: it is rounded once, not after every run
    for index, (run, keys, values) in enumerate(runs.copies(lambda where: pages.read(where, query))):
        heads = run.heads
        some, before = (query, (output, lse)) if heads is None else (query[heads], (output[heads], lse[heads]))
        part = _attend_blocks(some, keys, values, run.hidden, scale, backend)
        after = at_least_float32(part.output), part.lse
        if index:
            # Merged at once: outputs of all runs would outgrow the keys where queries are more than a run has slots.
            pairs = [(of.unsqueeze(1), sums.unsqueeze(1)) for of, sums in (before, after)]
            merged = merge_attention(pairs)
            after = merged[0].squeeze(1), merged[1].squeeze(1)
        if heads is not None:
            after = output.index_copy(0, heads, after[0]), lse.index_copy(0, heads, after[1])
        output, lse = after
    return output.to(query.dtype), lse


def _attend_blocks(query: Tensor, keys: Tensor, values: Tensor, hidden: Hidden, scale: float, backend: str) -> _Partial:
    """Independent attentions: ``query (N, Q, D)`` over those of ``keys (N, S, D)`` that are not hidden."""
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    if backend == "bmm":
        scores = torch.baddbmm(hidden.bias(query.dtype).unsqueeze(1), query, keys.transpose(1, 2), alpha=scale)
        best = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(best).exp_()  # (N, Q, S)
        return _Partial(torch.bmm(weights, values), best.squeeze(-1), weights.sum(-1))
    query, keys, values = query.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1)
    if backend == "flash_cpu":
        mask = hidden.bias(query.dtype)[:, None, None].expand(-1, -1, query.shape[2], -1)
        output, lse = flash(query, keys, values, causal=False, mask=mask, scale=scale)
    else:
        bias = hidden.bias(torch.promote_types(query.dtype, torch.float32)).unsqueeze(1)
        output, lse = attention(query, keys, values, key_bias=bias, causal=False, scale=scale, backend="chunked")
    return _Partial(output.squeeze(1), lse.squeeze(1))


def _attend_by_formula(query: Tensor, keys: Tensor, values: Tensor, hidden: Hidden, scale: float) -> _Partial:
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
    return _Partial(output.to(query.dtype), (highest + total.log()).squeeze(-1))


def _nothing(query: Tensor) -> Tensor:
    """The log-sum-exp of queries ``(..., D)`` that see no key."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.full(query.shape[:-1], float("-inf"), dtype=wide, device=query.device)
