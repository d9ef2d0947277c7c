"""Blocks and pages of layers with full and streaming heads: the sizes that a request takes."""

import pytest
import torch

from kvtrain.inference.vllm.ring_pages import block_tokens, ring_layout, ring_store
from kvtrain.models.paged_layers import PagedLayer, Ring

HEAD_DIM = 64
TOKENS = 2048


def sizes(full, heads, sink, recent, dtype=torch.bfloat16):
    """Tokens of a block; its bytes; the ring's layout; bytes of a full cache of so many tokens."""
    layer = PagedLayer(0, full, ring=Ring(heads - full, HEAD_DIM, sink, recent))
    block, pair = block_tokens(layer), 2 * HEAD_DIM * dtype.itemsize
    layout = ring_layout(ring_store(layer.ring, dtype), layer, block)
    assert layout.num_bytes == (heads - full) * (sink + recent) * pair
    return block, block * full * pair, layout, TOKENS * heads * pair


# Tokens of a block, pages of a ring, its share of their bytes, a request's share of a full cache.
TABLE = {
    (4, 8, 128, 256): (128, 3, 1.0, 0.60),
    (1, 2, 128, 256): (128, 3, 1.0, 0.60),
    (2, 8, 128, 256): (384, 3, 1.0, 0.43),
    (6, 8, 128, 256): (64, 2, 1.0, 0.80),
    (4, 8, 8, 24): (32, 1, 1.0, 0.51),
    (1, 2, 8, 24): (32, 1, 1.0, 0.51),
    (2, 8, 8, 24): (32, 3, 1.0, 0.27),
    (6, 8, 8, 24): (32, 1, 1 / 3, 0.77),  # a block has 32 tokens at least
    (4, 8, 64, 256): (128, 3, 0.83, 0.60),
}


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_request_takes_little_more_than_its_heads_see(case, dtype):
    full, heads, sink, recent = case
    block, page, layout, whole = sizes(*case, dtype)
    tokens, pages, share, most = TABLE[case]
    assert (block, layout.num_pages) == (tokens, pages)
    assert layout.piece_bytes <= page and layout.num_pages * layout.piece_bytes >= layout.num_bytes
    assert layout.num_bytes / (layout.num_pages * page) == pytest.approx(share, abs=0.01)
    taken = -(-TOKENS // block) * page + layout.num_pages * page
    seen = full / heads + (1 - full / heads) * (sink + recent) / TOKENS
    assert seen <= taken / whole <= most


@pytest.mark.parametrize(("full", "sink", "recent"), [(f, s, r) for f in (1, 3, 5, 7) for s, r in ((0, 1), (5, 700))])
def test_blocks_are_what_kernels_take_and_rings_have_few_pages(full, sink, recent):
    block, _, layout, _ = sizes(full, 8, sink, recent)
    assert block % 32 == 0 and 1 <= layout.num_pages <= 3


def test_a_layer_without_full_heads_has_one_page():
    layer = PagedLayer(0, 0, ring=Ring(8, HEAD_DIM, 4, 29))
    layout = ring_layout(ring_store(layer.ring, torch.float32), layer, 16)
    assert layout.num_pages == 1 and layout.piece_bytes == layout.num_bytes == 33 * 8 * 2 * HEAD_DIM * 4
