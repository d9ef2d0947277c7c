"""Attention over keys and values that lie on pages, without a dense copy of them.

Every page is attended by itself, where it lies, and the partial results are merged by their log-sum-exp: few
queries read each page once (flash decoding with a page as the split), whatever length each head has. Where many
queries share the pages, runs of pages are copied instead, a bounded number at a time.

No gradient flows into pages: a cache holds constants.
"""

import torch
from torch import Tensor

from kvtrain.kernels.attention import attention, check_groups, merge_attention
from kvtrain.kernels.dispatch import at_least_float32, choose_backend
from kvtrain.kernels.visibility import finite, log_sum_exp

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

_RUN = 1024  # slots of one head that many queries attend at a time


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Let every query see the first ``lengths`` slots of its row and head.

    Args:
        query: ``(B, H, n, D)``.
        keys: ``(pages, page_size, D)``.
        values: ``(pages, page_size, D_v)``.
        table: ``(B, H_kv, P)`` pages of each head in order, -1 where there is none; no page has two owners.
        lengths: ``(B, H_kv)`` visible slots.
        scale: Factor on the scores.
        backend: ``"auto"``, ``"flash_cpu"`` or ``"chunked"``, for each page's own attention.

    Returns:
        Output ``(B, H, n, D_v)`` and log-sum-exp ``(B, H, n)``; zeros and ``-inf`` where nothing is visible.

    Raises:
        ValueError: Head counts do not fit, or the backend cannot run this call.
    """
    batch, heads, num_queries, dim = query.shape
    check_groups(heads, table.shape[1])
    if not query.numel():
        return query.new_zeros(batch, heads, num_queries, values.shape[2]), _nothing(query)
    if torch.is_grad_enabled() and query.requires_grad:  # the pages are written again before a backward pass comes
        keys, values = keys.clone(), values.clone()
    # The queries of one key-value head side by side: (B * H_kv, G * n, D).
    grouped = query.reshape(batch * table.shape[1], -1, dim)
    attend = _attend_in_place if grouped.shape[1] <= keys.shape[1] else _attend_runs
    output, lse = attend(grouped, keys, values, table.flatten(0, 1), lengths.flatten(), scale, backend)
    return output.reshape(batch, heads, num_queries, -1), lse.reshape(batch, heads, num_queries)


def _attend_in_place(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """All pages at once: ``query (R, Q, D)``, ``table (R, P)``, ``lengths (R,)``."""
    num_pages, page_size = keys.shape[:2]
    if not num_pages:
        return query.new_zeros(*query.shape[:2], values.shape[2]), _nothing(query)
    start = torch.arange(table.shape[1], device=table.device) * page_size
    visible = (lengths[:, None] - start).clamp(0, page_size)  # (R, P)
    # One entry more than there are pages: that is where the table's -1 points to.
    owner, filled = table.new_zeros(2, num_pages + 1)
    owner[table] = torch.arange(table.shape[0], dtype=table.dtype, device=table.device)[:, None]
    filled[table] = visible.to(table.dtype)
    output, lse = _attend_blocks(query[owner[:-1]], keys, values, filled[:-1], scale, backend)
    pages = table.clamp(min=0)
    lse = lse[pages].masked_fill((visible == 0).unsqueeze(-1), float("-inf"))  # (R, P, Q)
    total = log_sum_exp(lse, 1)
    weights = torch.exp(lse - finite(total).unsqueeze(1)).unsqueeze(-1)
    return (weights * at_least_float32(output)[pages]).sum(1).to(query.dtype), total


def _attend_runs(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Some columns of the table at a time, for those heads that reach so far; arguments as above."""
    page_size = keys.shape[1]
    columns = max(1, _RUN // page_size)
    lse = _nothing(query)
    output = lse.new_zeros(*query.shape[:2], values.shape[2])  # wide: it is rounded once, not after every run
    for begin in range(0, table.shape[1], columns):
        left = lengths - begin * page_size
        rows = (left > 0).nonzero().squeeze(1)
        pages = table[rows, begin : begin + columns].clamp(min=0)
        block = (keys[pages].flatten(1, 2), values[pages].flatten(1, 2))
        part = _attend_blocks(query[rows], *block, left[rows].clamp(max=block[0].shape[1]), scale, backend)
        merged = merge_attention([(output[rows, None], lse[rows, None]), (part[0][:, None], part[1][:, None])])
        output[rows], lse[rows] = merged[0].squeeze(1), merged[1].squeeze(1)
    return output.to(query.dtype), lse


def _attend_blocks(
    query: Tensor, keys: Tensor, values: Tensor, filled: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Independent attentions: ``query (N, Q, D)`` over the first ``filled (N,)`` of ``keys (N, S, D)``."""
    plain = query.device.type == "cpu" and query.dtype != torch.float16 and keys.shape == values.shape
    # torch's kernel has no gradient of its log-sum-exp, by which parts are merged.
    fast = ["flash_cpu"] if plain and not (torch.is_grad_enabled() and query.requires_grad) else []
    chosen = choose_backend("paged attention", backend, [*fast, "chunked"])
    hidden = torch.arange(keys.shape[1], device=keys.device) >= filled[:, None]  # (N, S)
    query, keys, values = query.unsqueeze(1), keys.unsqueeze(1).to(query.dtype), values.unsqueeze(1).to(query.dtype)
    if chosen == "flash_cpu":
        mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
        mask = mask[:, None, None].expand(-1, -1, query.shape[2], -1)
        output, lse = _flash(query, keys, values, 0.0, False, attn_mask=mask, scale=scale)
    else:
        bias = torch.zeros(hidden.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
        bias = bias.masked_fill_(hidden, float("-inf")).unsqueeze(1)
        output, lse = attention(query, keys, values, key_bias=bias, causal=False, scale=scale, backend="chunked")
    return output.squeeze(1), lse.squeeze(1)


def _nothing(query: Tensor) -> Tensor:
    """The log-sum-exp of queries ``(..., D)`` that see no key."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.full(query.shape[:-1], float("-inf"), dtype=wide, device=query.device)
