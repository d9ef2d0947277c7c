"""LCKV while it serves: what a prompt's chunks and the rows beside it must not change, and what the memory holds."""

import random

import pytest
import torch
from transformers import DynamicCache

import kvtrain
from kvtrain.kernels.paged_attention import _Pages
from kvtrain.models.lckv.layer_schedule import LayerSchedule
from kvtrain.models.lckv.serving import _settle
from kvtrain.training.lckv import serving_gap
from tests.hosts import make_host, random_ids
from tests.models.lckv_models import NODIAG, SEMANTICS, close, make, refer, run
from tests.models.lckv_reference import loss_of
from tests.thinning import thinned

BLOCK, LENGTH = 8, 37
# Down-reading, several owners in a stage and several stages, owners below a stage, windows.
MAPS = ("0_3_3_3_3_5", "0_2_2_4_4_5", "0_4_0_4_4_5", "0_3_4_3_4_5", "0s_4s_4s_4s_4s_4s", "1_1_3_3_5_5")
# Three passes over blocks of eight: what comes out is no fixed point.
FEW = {"passes": (2, 1), "prefill_block": BLOCK, "page_size": 4}
# Every map as it is, and some in other ways.
TOLERANT = {"prefill_tolerance": 1e-3}
CASES = [
    *((kv_map, {}) for kv_map in MAPS),
    ("0_3_4_3_4_5", NODIAG),
    ("0_2_2_4_4_5", SEMANTICS[2]),
    ("0s_4s_4s_4s_4s_4s", SEMANTICS[2]),
]
TOLERANT_CASES = [*CASES, ("0_3_3_3_3_5", TOLERANT), ("0s_4s_4s_4s_4s_4s", TOLERANT)]
# Among them all that the maps and the ways differ in.
SOME_CASES = [("0_4_0_4_4_5", {}), ("1_1_3_3_5_5", {}), *CASES[len(MAPS) :]]
SOME_TOLERANT_CASES = [*SOME_CASES, ("0_3_3_3_3_5", TOLERANT)]

pytestmark = pytest.mark.filterwarnings("ignore:kv_map '1_1:UserWarning")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def serve(model, ids, sizes, mask=None, cache=None, **told):
    """Feed chunks of these sizes through one cache; logits of all, and the cache."""
    cache, mask = cache or model.make_cache(), torch.ones_like(ids) if mask is None else mask
    parts = zip(ids.split(sizes, 1), mask.split(sizes, 1), strict=True)
    logits = [model(part, attention_mask=real, past_key_values=cache, **told).logits for part, real in parts]
    return torch.cat(logits, 1), cache


def prompt(model, ids, sizes, mask=None, cache=None):
    return serve(model, ids, sizes, mask, cache, prefill=True)


@pytest.mark.parametrize(("kv_map", "semantics"), thinned(CASES, SOME_CASES))
def test_prefill_and_decoding_are_the_parallel_form(kv_map, semantics):
    """As many passes as tokens."""
    model = make(kv_map, (LENGTH, 2), prefill_block=BLOCK, page_size=4, **semantics)
    ids = random_ids(2, LENGTH)
    expected = run(model, ids)
    close(expected, refer(model, kv_map, semantics).sequential(ids))
    for sizes in ([LENGTH], [5, 8, 1, 1, 9, 13], [3] + [1] * 20 + [14]):
        close(serve(model, ids, sizes)[0], expected)


@pytest.mark.parametrize(("kv_map", "semantics"), thinned(CASES, SOME_CASES))
def test_a_few_passes_a_block_are_the_equations(kv_map, semantics):
    """Every block iterates over what the blocks before it have left, and that is not the training form."""
    model, ids = make(kv_map, **FEW, **semantics), random_ids(2, LENGTH)
    served, _ = prompt(model, ids, [LENGTH])
    close(served, refer(model, kv_map, semantics).blocks(ids, 3, BLOCK, "stale_target" in semantics))
    assert (served - run(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize(("kv_map", "way"), thinned(TOLERANT_CASES, SOME_TOLERANT_CASES))
def test_chunks_of_a_prompt_change_nothing(kv_map, way):
    model, ids = make(kv_map, **FEW, **way), random_ids(2, LENGTH)
    expected, cache = prompt(model, ids, [LENGTH])
    for sizes in ([1] * LENGTH, [5, 8, 1, 1, 9, 13]):
        found, chunked = prompt(model, ids, sizes)
        close(found, expected)
        assert torch.equal(chunked.kv_tokens(), cache.kv_tokens())


@pytest.mark.parametrize(("kv_map", "way"), thinned(TOLERANT_CASES, SOME_TOLERANT_CASES))
def test_padding_and_other_rows_change_nothing(kv_map, way):
    """A row that reads a prompt, one that is shorter, and one that waits at first; padding stands anywhere."""
    model, ids = make(kv_map, **FEW, **way), random_ids(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, [0, 5, 6, 20]] = mask[1, 30:] = mask[2, :17] = 0
    found, cache = prompt(model, ids, [4, 9, 3, 1, 20], mask)
    for row in range(3):
        alone, _ = prompt(model, ids[row : row + 1, mask[row] > 0], [int(mask[row].sum())])
        close(found[row, mask[row] > 0], alone[0])
    assert cache.tokens.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize(("kv_map", "way"), TOLERANT_CASES[1::3])
def test_a_second_turn_may_be_cut_anywhere(kv_map, way):
    """Decoded tokens stand as they are; the turn after them starts a block of its own, also beside other rows."""
    model, ids, turns = make(kv_map, **FEW, **way), random_ids(2, 34), []
    for rows, sizes in ((2, [16]), (2, [5, 4, 7]), (2, [3, 13]), (1, [1, 15])):
        cache = model.make_cache()
        _, cache = prompt(model, ids[:rows, :13], [13])
        decoded, _ = serve(model, ids[:rows, 13:18], [1] * 5, cache=cache)
        turn, _ = prompt(model, ids[:rows, 18:], sizes, cache=cache)
        turns.append(torch.cat([decoded, turn], 1))
    for turn in turns[1:]:
        close(turn, turns[0][: turn.shape[0]])


def test_a_row_may_decode_beside_one_that_reads():
    """A single token is a decoded one, unless it is said to be part of a prompt."""
    model, ids = make("0_3_3_3_3_5", **FEW), random_ids(2, 20)
    _, cache = prompt(model, ids[:, :13], [13])
    mask = torch.tensor([[1] * 5, [0] * 4 + [1]])
    sent = torch.stack([ids[0, 13:18], ids[1, [0, 0, 0, 0, 13]]])
    found, _ = serve(model, sent, [5], mask, cache)
    read, _ = prompt(model, ids[:1], [20])
    close(found[0], read[0, 13:18])
    _, alone = prompt(model, ids[1:, :13], [13])
    close(found[1:, 4:], serve(model, ids[1:, 13:14], [1], cache=alone)[0])
    assert cache.layers[1].pending.counts.tolist() == [18 - 16, 0]
    turn, _ = prompt(model, ids[1:, 14:], [6], cache=alone)
    mask, sent = torch.tensor([[0] * 6, [1] * 6]), torch.stack([ids[0, :6], ids[1, 14:]])
    close(prompt(model, sent, [2, 4], mask, cache)[0][1:], turn)


@pytest.mark.parametrize("seed", range(5))
def test_random_prompts_in_random_batches(seed):
    """Every row is what it would be alone and in one go, whatever the map, the passes, the block and the page."""
    draw = random.Random(seed)
    model = make(
        draw.choice(MAPS),
        (draw.randint(0, 4), draw.randint(1, 2)),
        prefill_block=draw.randint(2, 12),
        prefill_tolerance=draw.choice([None, None, 1e-2]),
        page_size=draw.randint(1, 9),
    )
    ids, seen, cache = random_ids(3, 30), [0, 0, 0], model.make_cache()
    expected = prompt(model, ids, [30])[0]
    while min(seen) < 30:
        counts = [min(draw.choice([0, 1, 2, 5, 11]), 30 - count) for count in seen]
        width = max(1, *counts) + draw.randint(0, 1)
        mask, sent = torch.zeros(2, 3, width, dtype=torch.long)
        for row, count in enumerate(counts):
            places = sorted(draw.sample(range(width), count))
            mask[row, places], sent[row, places] = 1, ids[row, seen[row] : seen[row] + count]
        logits = model(sent, attention_mask=mask, past_key_values=cache, prefill=True).logits
        for row, count in enumerate(counts):
            close(logits[row, mask[row] > 0], expected[row, seen[row] : seen[row] + count])
            seen[row] += count


def test_rows_move_in_the_middle_of_a_block():
    """What is remembered of an unfinished block goes where its row goes."""
    model, ids = make("0_3_3_3_3_5", **FEW), random_ids(3, 30)
    expected, _ = prompt(model, ids, [30])
    _, cache = prompt(model, ids[:2, :13], [13])
    cache.join(prompt(model, ids[2:, :6], [6])[1])
    before = cache.snapshot_row(1)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    mask = torch.ones(3, 14, dtype=torch.long)
    sent = torch.stack([ids[2, 6:20], ids[0, 13:27], ids[1, 13:27]])
    found, _ = prompt(model, sent, [3, 11], mask, cache)
    close(found, torch.stack([expected[2, 6:20], expected[0, 13:27], expected[1, 13:27]]))
    cache.free_rows([1, 2])
    cache.restore_row(0, before)
    close(prompt(model, ids[1:2, 13:], [17], cache=cache)[0], expected[1:2, 13:])


@pytest.mark.parametrize("way", [{}, TOLERANT])
def test_generating_with_prefill_in_chunks(way):
    """The last chunk may be a single token, and is a part of the prompt all the same."""
    model, ids = make("0_3_3_3_3_5", **FEW, **way), random_ids(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    told = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **told, output_logits=True, return_dict_in_generate=True)
    for size in (1, 4, 16):
        found = model.generate(ids, **told, prefill_chunk_size=size, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(found.sequences, expected.sequences)
        close(torch.stack(found.logits), torch.stack(expected.logits))


def test_passes_over_a_block_copy_what_lies_before_it_once(monkeypatch):
    """The layers that run once, 0, 4 and 5, copy once each; the others once together, in three passes."""
    model, ids, copies, read = make("0_3_3_3_3_5", **FEW), random_ids(1, 2 * BLOCK), [], _Pages.read
    _, cache = prompt(model, ids[:, :BLOCK], [BLOCK])
    monkeypatch.setattr(_Pages, "read", lambda *given: copies.append(given) or read(*given))
    prompt(model, ids[:, BLOCK:], [BLOCK], cache=cache)
    assert len(copies) == 3 + 1


def test_a_tolerance_spares_passes(monkeypatch):
    """The tighter, the nearer to decoding token by token and the more passes; never more than a block has tokens."""
    ids, passes, errors, update_kv = random_ids(2, 32), [], [], LayerSchedule.update_kv

    def count(*given, **more):
        passes[-1] += 1
        update_kv(*given, **more)

    monkeypatch.setattr(LayerSchedule, "update_kv", count)
    for tolerance in (0.3, 1e-2, 1e-12):
        model = make("0_3_3_3_3_5", (2, 1), prefill_block=16, prefill_tolerance=tolerance)
        exact = refer(model, "0_3_3_3_3_5").sequential(ids)
        passes.append(0)
        errors.append((prompt(model, ids, [32])[0] - exact).abs().max().item())
    assert 2 <= passes[0] < passes[1] <= passes[2] <= 2 * 15
    assert errors[0] > errors[1] > errors[2] and errors[1] < 0.1 and errors[2] < 1e-9


def test_a_token_rests_after_those_before_it():
    """Its own change is not enough; once it rests it stays as it is, and the largest token so far is the measure."""
    still = torch.ones(1, 1, 4, 2)
    moves = torch.tensor([0.0, 0.5, 0.0, 0.05]).view(1, 1, 4, 1)
    shared = {7: (still + moves, still)}
    done = _settle({7: (still, still)}, shared, torch.zeros(1, 4, dtype=torch.bool), 0.1)
    assert done.tolist() == [[True, False, False, False]]
    later = {7: (shared[7][0] + 0.06, shared[7][1])}
    done = _settle(shared, later, done, 0.1)
    assert done.all()
    close(later[7][0][0, 0, :, 0], torch.tensor([1.0, 1.56, 1.06, 1.11]), 1e-6)
    large = {7: (still * torch.tensor([9.0, 1, 1, 1]).view(1, 1, 4, 1), still)}
    moved = {7: (large[7][0] + 0.8, still)}
    assert _settle(large, moved, torch.zeros(1, 4, dtype=torch.bool), 0.1).all()
    assert not _settle({7: None}, moved, torch.zeros(1, 4, dtype=torch.bool), 0.1).any()


# Memory.


@pytest.mark.parametrize(
    ("kv_map", "settings", "tensors"),
    [
        ("plain", {}, 12),
        ("lckv-w2", {}, 6),
        ("cla2", {}, 6),
        ("0_4_0_4_4_5", {}, 6),
        ("0_1_2_2_2_2", {"value_map": "first"}, 6),
        ("0_1_2_2_2_2", {"value_map": "0_0_0_0_0_0"}, 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bytes_a_token(kv_map, settings, tensors, dtype):
    """Pages of keys and values for the owners alone: 32 tokens more are 8 pages a head more."""
    host = make_host(layers=6, kv_heads=2, dtype=dtype)
    model = kvtrain.retrofit(host, kvtrain.LCKV(kv_map=kv_map, page_size=4, forward_passes=70, **settings))
    cache, held = model.make_cache(), []
    for part in random_ids(1, 64).split(32, 1):
        model(part, past_key_values=cache)
        held.append(cache.kv_bytes() - cache.free_bytes())
    table = 2 * 8 * 4
    assert held[1] - held[0] - table == 32 * tensors * 2 * 8 * dtype.itemsize
    kept = cache.kv_tokens()
    owners = {int(entry) for entry in str(model.model.layers.keys).split("_")}
    owners |= {int(entry) for entry in str(model.model.layers.values).split("_")}
    assert [bool(tokens.any()) for tokens in kept] == [layer in owners for layer in range(6)]
    assert kept.max() == 64


def test_windows_take_constant_memory():
    """Rings as long as a window, and a block more where a stage may read it again."""
    model, held = make("0s_2s_2s_3s", **FEW), []
    cache = model.make_cache()
    for part in random_ids(1, 80).split(16, 1):
        model(part, past_key_values=cache)
        held.append(cache.kv_bytes())
    assert len(set(held)) == 1
    assert cache.kv_tokens()[:, 0, 0].tolist() == [5, 0, 5 + BLOCK, 5]


def test_what_is_pending_is_given_back():
    """Inputs of an unfinished block take one page a row until a token is decoded, or the block is full."""
    model, ids = make("0_3_3_3_3_5", **FEW), random_ids(2, 24)
    _, cache = prompt(model, ids[:, :13], [13])
    pending = cache.layers[1].pending
    page = BLOCK * 32 * 8
    assert pending.counts.tolist() == [5, 5] and pending.num_bytes() >= 2 * page
    mask = torch.tensor([[1], [0]])
    model(ids[:, 13:14], attention_mask=mask, past_key_values=cache)
    assert pending.counts.tolist() == [0, 5] and page <= pending.num_bytes() < page + 100
    prompt(model, ids[:, 14:], [10], torch.tensor([[0] * 10, [1] * 3 + [0] * 7]), cache)
    assert pending.counts.tolist() == [0, 0] and pending.num_bytes() - pending.free_bytes() < 100
    exact = make("0_3_3_3_3_5", (LENGTH, 1), prefill_block=BLOCK).make_cache()
    assert all(layer.pending is None for layer in exact.layers)


def test_the_gap_between_serving_and_training():
    """What training logs: the loss block by block minus the loss pass by pass; none where passes are enough."""
    ids = random_ids(2, LENGTH)
    model = make("0_3_3_3_3_5", **FEW)
    reference = refer(model, "0_3_3_3_3_5")
    expected = loss_of(reference.blocks(ids, 3, BLOCK), ids) - loss_of(reference.parallel(ids, 2, 1), ids)
    gap = serving_gap(model, ids, torch.ones_like(ids).bool())
    assert abs(expected) > 1e-4 and gap.item() == pytest.approx(expected.item(), abs=1e-6)
    exact = serving_gap(make("0_3_3_3_3_5", (LENGTH, 1)), ids, torch.ones_like(ids).bool())
    assert abs(exact) < 1e-6


@pytest.mark.parametrize("kv_map", MAPS)
def test_autocast(kv_map):
    """The cache holds float32 where layers make bfloat16."""
    model, ids = make(kv_map, **FEW, host={"dtype": torch.float32}), random_ids(2, LENGTH)
    expected, _ = prompt(model, ids, [LENGTH])
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = prompt(model, ids, [13, 1, 23])
    assert found.dtype == torch.bfloat16
    close(found.float(), expected, 0.05)


# Refusals.


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"kv_map": "0_3_3_3"}, "the host 6 layers; give one a layer"),
        ({"kv_map": "0_4_4_4_4_5", "value_map": "first"}, "leave it out, or choose another kv_map"),
        ({"kv_map": "0_1_2_2_2_2", "value_map": "0_4_4_4_4_5"}, "leave it out, or choose another kv_map"),
        ({"kv_map": "0_4_4_4_4_5", "residual": True}, "such as 'pizza-bottom'; turn it off"),
        ({"kv_map": "0s_4s_0s_4s_4s_5"}, "drop the 's' of both, or let it read a layer from 1 to 4"),
        ({"kv_map": "0s_1_1_1_1_1", "value_map": "0_1_1_1_1_1"}, "must mark the same layers"),
        ({"kv_map": "0s_1_1_1_1_1", "value_map": "first"}, "mark both with 's', or neither"),
    ],
)
def test_maps_that_cannot_be_served_are_refused(settings, remedy):
    with pytest.raises(ValueError, match=remedy):
        kvtrain.retrofit(make_host(layers=6), kvtrain.LCKV(**settings))


def test_calls_that_cannot_be_honoured_are_refused():
    model, ids = make("0_3_3_3_3_5", **FEW), random_ids(1, 6)
    with pytest.raises(ValueError, match="does not fit this model"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="no option 'bogus'"):
        model.make_cache(bogus=1)
    with pytest.raises(ValueError, match="needs recent="):
        model.make_cache(sink=4)
