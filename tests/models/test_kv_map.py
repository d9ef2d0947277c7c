"""Maps of whose keys and values each layer reads: grammar, presets, stages and refusals."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrain
from kvtrain.models.lckv.kv_map import KVMap, Stage, parse_map, repeats, values_map
from tests.hosts import make_host


def entries(text, depth):
    return str(parse_map(text, depth))


@pytest.mark.parametrize(
    ("preset", "depth", "expected"),
    [
        ("plain", 4, "0_1_2_3"),
        ("cla2", 6, "0_0_2_2_4_4"),
        ("cla3", 7, "0_0_0_3_3_3_6"),
        ("yoco", 6, "0s_1s_2s_3_3_3"),
        ("yoco", 5, "0s_1s_2_2_2"),
        ("yi", 8, "0s_1s_2s_3_4s_5s_6s_3"),
        ("yi", 13, "0s_1s_2s_3_4s_5s_6s_3_8s_9s_10s_11_12s"),
        ("lckv-w2", 6, "0_4_4_4_4_5"),
        ("lckv-w3", 6, "0_3_3_3_4_5"),
        ("lckv-w4", 8, "0_1_5_5_5_5_6_7"),
        ("pizza-bottom-3", 6, "0_1_2_2_2_2"),
        ("pizza-middle-3", 6, "0_1_3_3_3_3"),
        ("pizza-top-3", 6, "0_1_5_5_5_5"),
        ("sandwich-bottom-4", 8, "0_1_2_2_2_2_2_7"),
        ("sandwich-middle-4", 8, "0_1_4_4_4_4_4_7"),
        ("sandwich-top-4", 8, "0_1_6_6_6_6_6_7"),
        ("lasagna-bottom-2", 6, "0_0_0_3_3_3"),
        ("lasagna-middle-2", 6, "1_1_1_4_4_4"),
        ("lasagna-top-2", 6, "2_2_2_5_5_5"),
        ("lasagna-bottom-3", 7, "0_0_2_2_4_4_4"),
        ("pizza-bottom", 6, "0_1_2_2_2_2"),
        ("lasagna-bottom", 7, "0_1_1_3_3_5_5"),
        ("pizza-bottom-1", 4, "0_0_0_0"),
        ("pizza-bottom-4", 4, "0_1_2_3"),
    ],
)
@pytest.mark.filterwarnings("ignore:kv_map 'lasagna:UserWarning")
def test_presets(preset, depth, expected):
    assert entries(preset, depth) == expected


def test_the_published_maps_of_22_layers():
    """As their authors write them down: three KV layers with w = 2, eleven with w = 10."""
    middle = "_".join(["0", *["10"] * 20, "21"])
    assert entries("lckv-w2", 22) == "_".join(["0", *["20"] * 20, "21"]) == entries("sandwich-top-3", 22)
    assert entries("sandwich-middle-3", 22) == middle
    assert len(parse_map("lckv-w10", 22).owners) == 11
    assert entries("lckv-w10", 22) == "_".join([*map(str, range(5)), *["16"] * 12, *map(str, range(17, 22))])
    assert entries("cla2", 22) == entries("lasagna-bottom-11", 22)
    assert entries("yoco", 22) == "_".join([*(f"{layer}s" for layer in range(11)), *["11"] * 11])
    with pytest.warns(UserWarning, match="let its entry be 0"):
        assert entries("lckv-w0", 22) == "_".join(["21"] * 22)


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("0_1_2", [(0, 2, False)]),
        ("0_0_2_2", [(0, 3, False)]),
        ("0_4_4_4_4_5", [(0, 0, False), (1, 4, True), (5, 5, False)]),
        ("0_2_2_2_2_5", [(0, 0, False), (1, 2, True), (3, 5, False)]),
        ("0_2_2_4_4_5", [(0, 0, False), (1, 2, True), (3, 4, True), (5, 5, False)]),
        ("0_2_2_3_5_5", [(0, 0, False), (1, 2, True), (3, 3, False), (4, 5, True)]),
        ("0_3_4_3_4_4", [(0, 0, False), (1, 4, True), (5, 5, False)]),
        ("0_3_5_3_7_5_6_7", [(0, 0, False), (1, 7, True)]),
        ("0_2_2_4_4_2", [(0, 0, False), (1, 2, True), (3, 4, True), (5, 5, False)]),
        ("0_3_0_3_4_4", [(0, 0, False), (1, 3, True), (4, 5, False)]),
    ],
)
def test_stages(text, stages):
    """A cyclic stage ends at the highest layer that anything in it reads; what stands between runs together."""
    assert parse_map(text, len(text.split("_"))).stages() == [Stage(*stage) for stage in stages]


@st.composite
def any_map(draw):
    """Owners and windows at random, every other layer reading an owner of its kind."""
    depth = draw(st.integers(1, 12))
    owners = draw(st.lists(st.booleans(), min_size=depth, max_size=depth))
    sliding = draw(st.lists(st.booleans(), min_size=depth, max_size=depth))
    sources = []
    for layer in range(depth):
        same = [owner for owner in range(depth) if owners[owner] and sliding[owner] == sliding[layer]]
        sources.append(layer if owners[layer] or not same else draw(st.sampled_from(same)))
    for layer, source in enumerate(sources):
        assert sources[source] == source, (layer, sources)
    return KVMap(tuple(sources), tuple(sliding))


@settings(max_examples=200)
@given(any_map())
def test_any_map_is_read_as_it_is_written_and_runs_in_order(kv_map):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert parse_map(str(kv_map), kv_map.depth) == kv_map
    assert sorted(reader for owner in kv_map.owners for reader in kv_map.readers(owner)) == list(range(kv_map.depth))
    covered, cyclic_before = [], True
    for stage in kv_map.stages():
        layers = range(stage.first, stage.last + 1)
        covered += layers
        # All that is read is in the stage or below it; a cyclic one needs its first layer, and ends with an owner.
        assert max(kv_map.sources[layer] for layer in layers) <= stage.last
        assert stage.cyclic == any(map(kv_map.is_cyclic, layers))
        assert not stage.cyclic or (kv_map.is_cyclic(stage.first) and stage.last in kv_map.owners)
        assert stage.cyclic or cyclic_before
        cyclic_before = stage.cyclic
    assert covered == list(range(kv_map.depth))


@pytest.mark.parametrize(
    ("text", "depth", "remedy"),
    [
        ("", 4, "'' is not understood; give a map such as"),
        ("0_1t_2", 3, "is not understood; give a map such as"),
        ("0_-1", 2, "is not understood"),
        ("lckv", 4, "is not understood"),
        ("pizza-side", 4, "is not understood"),
        ("0_1_2", 4, "has 3 entries and the host 4 layers; give one a layer"),
        ("0_3_2", 3, "layer 1 reads layer 3; the last one is 2"),
        ("1_2s_0", 3, "let entry 1 be 1, or entry 0 be 2"),
        ("0_2_0_3", 4, "let entry 2 be 2, or entry 1 be 0"),
        ("0s_0", 2, "mark both with 's', or neither"),
        ("cla0", 4, "the number must be at least 1"),
        ("pizza-bottom-0", 4, "the number must be at least 1"),
        ("pizza-bottom-5", 4, "the host has 4 layers only"),
        ("lckv-w4", 4, "leaves none of 4 layers to share; give it fewer of their own"),
    ],
)
def test_wrong_maps_are_refused_with_the_remedy(text, depth, remedy):
    with pytest.raises(ValueError, match=remedy):
        parse_map(text, depth)


def test_a_first_layer_that_owns_nothing_is_warned_of():
    with pytest.warns(UserWarning, match="perplexity 222 against 14"):
        parse_map("1_1_2", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_map("0_2_2", 3)


@pytest.mark.parametrize(
    ("keys", "values", "expected"),
    [
        ("0_1_2_2_2", None, "0_1_2_2_2"),
        ("0_1_2_2_2", "first", "0_1_2_0_0"),
        ("0_1_2_2_2", "0_1_1_0_4", "0_1_1_0_4"),
        ("0_1_2_2_2", "cla2", "0_0_2_2_4"),
        ("0s_0s_2_2_2", "0s_1s_2_2_4", "0s_1s_2_2_4"),
        ("0_2_2", None, "0_2_2"),
    ],
)
def test_values_have_a_map_of_their_own(keys, values, expected):
    assert str(values_map(values, parse_map(keys, len(keys.split("_"))))) == expected


@pytest.mark.parametrize(
    ("keys", "values", "remedy"),
    [
        ("0_2_2", "first", "leave it out, or choose another kv_map"),
        ("0_1_1", "0_2_2", "leave it out, or choose another kv_map"),
        ("0s_1s_1s", "0_1_1", "must mark the same layers with 's'"),
        ("0_1_1", "0_1", "has 2 entries"),
    ],
)
def test_values_that_do_not_fit_are_refused(keys, values, remedy):
    with pytest.raises(ValueError, match=remedy):
        values_map(values, parse_map(keys, 3))


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"forward_passes": -1}, "forward_passes must not be negative"),
        ({"backward_passes": 0}, "backward_passes must be at least 1"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"prefill_block": 0}, "prefill_block must be at least 1"),
        ({"page_size": 0}, "page_size must be at least 1"),
        ({"stale_target": True}, "needs mask_all_diagonals=True"),
        ({"init": "zero"}, "init must be 'copy' or 'mean', not 'zero'"),
        ({"prefill_tolerance": 0.0}, "prefill_tolerance must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, remedy):
    with pytest.raises(ValueError, match=remedy):
        kvtrain.LCKV(**wrong)


@pytest.mark.parametrize(("kv_map", "once"), [("cla2", True), ("plain", True), ("lckv-w2", False), ("0_2_2_2", False)])
def test_settings_know_whether_layers_run_once(kv_map, once):
    assert kvtrain.LCKV(kv_map=kv_map).runs_layers_once(make_host(layers=4).config) is once


def test_a_stored_model_comes_back(tmp_path):
    """Maps, residuals and their numbers; the same logits bit for bit."""
    method = kvtrain.LCKV(kv_map="0_1_1", value_map="first", residual=True, sliding_window=9, init="mean")
    model = kvtrain.retrofit(make_host(layers=3), method)
    with torch.no_grad():
        model.model.layers[1].self_attn.key_mix.add_(0.1)
        model.save_pretrained(tmp_path)
        back = kvtrain.load(str(tmp_path))
        ids = torch.arange(3, 20)[None]
        assert back.method == method and torch.equal(back(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("text", "values", "depth", "expected"),
    [
        ("plain", None, 4, [[(0,), (1,), (2,), (3,)]]),
        ("lckv-w2", None, 7, [[(1,), (2,), (3,), (4,)]]),
        ("lckv-w4", None, 8, [[(0,), (1,)], [(2,), (3,), (4,)], [(6,), (7,)]]),
        ("cla2", None, 6, [[(0, 1), (2, 3), (4, 5)]]),
        ("cla2", None, 5, [[(0, 1), (2, 3)]]),
        ("cla3", None, 3, [[(1,), (2,)]]),
        ("yoco", None, 8, [[(0,), (1,), (2,), (3,)], [(5,), (6,), (7,)]]),
        ("lasagna-top-2", None, 6, [[(0, 1, 2), (3, 4, 5)]]),
        ("pizza-bottom-2", "first", 5, [[(2,), (3,), (4,)]]),
    ],
)
def test_layers_repeat_where_they_read_alike(text, values, depth, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys = parse_map(text, depth)
        assert repeats(keys, values_map(values, keys)) == expected


def test_a_map_loses_layers_that_nobody_reads():
    assert str(parse_map("0_4s_4s_4s_4s_5", 6).without({1, 3})) == "0_2s_2s_3"
    assert str(parse_map("cla2", 6).without({2, 3})) == "0_0_2_2"
