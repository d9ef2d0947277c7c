"""What vLLM can hold of every method, and in which words the rest is refused."""

import pytest

import kvtrain
from kvtrain.models import paged_layers as vocabulary
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.eviction.config import Eviction
from kvtrain.models.full.config import Full
from kvtrain.models.paged_layers import PagedLayer, Ring, paged_layers
from kvtrain.models.registry import methods
from tests.hosts import FAMILIES, make_host

LAYERS, HEADS, HEAD_DIM = 4, 8, 16
ONE_TABLE = "vLLM keeps one table of blocks for all of them; use kvtrain generate"
UNEVEN = (
    "full_heads has 4, 2, 6 heads in layers 0, 1, 2: vLLM pads all layers to the largest and nothing is saved; round "
    "with equal counts, or use kvtrain generate"
)

# Families whose answers the tests in tests/vllm hold against ours.
SERVED = [family for family in FAMILIES if family not in ("gemma3_text", "gpt_oss")]


def host(family="llama", layers=LAYERS):
    return FAMILIES[family](
        sliding_window=None,
        num_hidden_layers=layers,
        num_attention_heads=2 * HEADS,
        num_key_value_heads=HEADS,
        hidden_size=64,
        head_dim=HEAD_DIM,
    )


def config_of(method, **sizes):
    return KVTrainConfig(text_config=host(**sizes), method_config=method.to_dict())


def layers_of(method, **sizes):
    return paged_layers(config_of(method, **sizes))


def refusal(config):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        paged_layers(config)
    return str(caught.value)


def full_heads(*counts):
    return tuple(tuple(range(count)) for count in counts)


REFUSED = {
    "dmc": (kvtrain.DMC(), f"method 'dmc' is not served by vLLM: its heads have different lengths, and {ONE_TABLE}"),
    "dms": (kvtrain.DMS(), f"method 'dms' is not served by vLLM: its heads have different lengths, and {ONE_TABLE}"),
    "hybrid": (
        kvtrain.Hybrid(),
        "method 'hybrid' is not served by vLLM: its linear layers keep a state, and no blocks; use kvtrain generate",
    ),
    "a map from above": (
        kvtrain.LCKV(kv_map="lckv-w2"),
        "kv_map 'lckv-w2' reads keys from above, which takes iteration, and vLLM runs its layers once; serve it with "
        "kvtrain, or retrofit with a map that reads from below, such as 'cla2'",
    ),
    "diagonals": (
        kvtrain.LCKV(kv_map="cla2", mask_all_diagonals=True),
        "mask_all_diagonals is not served by vLLM, whose tokens see themselves; use kvtrain generate",
    ),
    "values elsewhere": (
        kvtrain.LCKV(kv_map="0_1_1_1", value_map="first"),
        "value_map is not served by vLLM: keys and values of one layer lie in one block; use kvtrain generate",
    ),
    "residual": (
        kvtrain.LCKV(kv_map="cla2", residual=True),
        "residual is not served by vLLM; use kvtrain generate",
    ),
    "fractions": (kvtrain.Duo(), "gates are fractions yet; run kvtrain export, which rounds them"),
    "duo compensation": (
        kvtrain.Duo(full_heads=full_heads(4, 4, 4, 4), compensation=True),
        "compensation is not served by vLLM; use kvtrain generate",
    ),
    "duo bits": (
        kvtrain.Duo(full_heads=full_heads(4, 4, 4, 4), kv_bits=8),
        "kv_bits is not served by vLLM; use kvtrain generate",
    ),
    "full bits": (Full(kv_bits=4), "kv_bits is not served by vLLM; use kvtrain generate"),
    "streaming bits": (
        kvtrain.StreamingLLM(prompt="blocks", kv_bits=2),
        "kv_bits is not served by vLLM; use kvtrain generate",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_words_of_a_refusal(name):
    method, words = REFUSED[name]
    assert refusal(config_of(method)) == words


def test_uneven_counts_of_full_heads_are_named_with_their_layers():
    assert refusal(config_of(kvtrain.Duo(full_heads=full_heads(4, 2, 6)), layers=3)) == UNEVEN


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"causal": False}, "a masked language model generates no text; open it with kvtrain.load"),
        (
            {"architectures": ["TransNormerForSequenceClassification"]},
            "a classifier generates no text; open it with kvtrain.load",
        ),
    ],
)
def test_what_generates_no_text_is_refused(settings, words):
    assert refusal(kvtrain.TransNormerConfig(**settings)) == words


def policies():
    """Every eviction policy that there is, whoever added it."""
    return {name: settings for name, settings in methods().items() if issubclass(settings, Eviction)}


@pytest.mark.parametrize("name", policies())
def test_every_policy_is_refused_as_it_is_by_default_and_all_but_one_in_blocks(name):
    settings = policies()[name]
    words = f"method {name!r} is not served by vLLM: its heads drop different tokens, and {ONE_TABLE}"
    for prompt in ("dense", "blocks"):
        method = settings(prompt=prompt)
        if name != "streamingllm":
            assert refusal(config_of(method)) == words
        elif prompt == "dense":
            assert "give it a budget in tokens, prompt='blocks' and every=1" in refusal(config_of(method))
        else:
            assert layers_of(method)[0].ring is not None


@pytest.mark.parametrize("method", [kvtrain.GEAR(), kvtrain.KIVI(prompt="blocks")])
def test_packed_blocks_are_refused(method):
    assert refusal(config_of(method)) == (
        f"method {method.name!r} is not served by vLLM: vLLM keeps keys and values as they are; use kvtrain generate"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": "dense"},
        {"every": 2},
        {"budget": 0.5},
        {"per_head": "adaptive"},
        {"per_layer": "pyramid"},
    ],
    ids="-".join,
)
def test_a_window_that_does_not_move_with_every_token_is_refused(changed):
    method = kvtrain.StreamingLLM(**{"budget": 32, "prompt": "blocks", **changed})
    assert refusal(config_of(method)) == (
        f"{method.described_cache()}: vLLM serves streamingllm with windows that move with every token and are alike "
        "everywhere; give it a budget in tokens, prompt='blocks' and every=1, or use kvtrain generate"
    )


def answer(config):
    """Layers, or the words of a refusal."""
    try:
        return paged_layers(config)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", methods())
def test_every_method_has_an_answer(name):
    """Whatever is added later is served by a file of its own, or refused in words that say what to do."""
    found = answer(config_of(methods()[name]()))
    remedies = ("use kvtrain generate", "serve it with kvtrain", "run kvtrain export")
    assert any(remedy in found for remedy in remedies) if isinstance(found, str) else len(found) == LAYERS


@pytest.fixture
def without_files(monkeypatch):
    """No folder has a file ``vllm.py``."""
    monkeypatch.setattr(vocabulary, "exported_by_files", lambda *names: [])


@pytest.mark.usefixtures("without_files")
def test_what_has_no_file_of_its_own_is_refused_by_name():
    for name, settings in methods().items():
        assert refusal(config_of(settings())) == f"method {name!r} is not served by vLLM; use kvtrain generate"
    assert refusal(kvtrain.TransNormerConfig()) == "'transnormer' is not served by vLLM; use kvtrain generate"


@pytest.mark.parametrize("family", SERVED)
def test_a_full_cache_is_blocks_of_all_heads(family):
    assert layers_of(Full(), family=family) == [PagedLayer(layer, HEADS) for layer in range(LAYERS)]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SERVED])
@pytest.mark.parametrize("method", [Full(), kvtrain.LCKV(kv_map="cla2")], ids=lambda method: method.name)
def test_a_family_that_nobody_has_seen_answer_there_is_refused(method, family):
    told = f"a host of type {family!r} is not served by vLLM; use kvtrain generate"
    assert refusal(config_of(method, family=family)) == told


@pytest.mark.parametrize(
    ("kv_map", "sources"),
    [
        ("cla2", [0, 0, 2, 2]),
        ("0_1_1_0", [0, 1, 1, 0]),
        ("plain", [0, 1, 2, 3]),
        ("pizza-bottom", [0, 1, 1, 1]),
    ],
)
def test_layers_read_the_blocks_of_a_layer_below(kv_map, sources):
    assert layers_of(kvtrain.LCKV(kv_map=kv_map)) == [PagedLayer(source, HEADS) for source in sources]


def test_a_value_map_that_says_the_same_is_served():
    assert layers_of(kvtrain.LCKV(kv_map="cla2", value_map="0_0_2_2")) == layers_of(kvtrain.LCKV(kv_map="cla2"))


def test_yoco_has_windows_below_and_one_memory_above():
    owners = [PagedLayer(layer, HEADS, window=96) for layer in (0, 1)]
    assert layers_of(kvtrain.LCKV(kv_map="yoco", sliding_window=96)) == [*owners, *[PagedLayer(2, HEADS)] * 2]


@pytest.mark.parametrize("full", [0, 2, 4, HEADS])
def test_duo_has_blocks_of_full_heads_and_a_ring_of_the_others(full):
    chosen = tuple(tuple(range(layer % 2, layer % 2 + full)) for layer in range(LAYERS))  # whichever they are
    chosen = chosen if full < HEADS else full_heads(*[HEADS] * LAYERS)
    ring = Ring(HEADS - full, HEAD_DIM, sink=16, recent=48) if full < HEADS else None
    expected = [PagedLayer(layer, full, ring=ring) for layer in range(LAYERS)]
    assert layers_of(kvtrain.Duo(full_heads=chosen, sink=16, recent=48)) == expected


def test_streamingllm_is_a_ring_that_shows_one_token_more_than_it_keeps():
    ring = Ring(HEADS, HEAD_DIM, sink=4, recent=29)
    for settings in ({}, {"recent": 7}, {"page_size": 4}):  # nothing of which moves the window
        method = kvtrain.StreamingLLM(budget=32, prompt="blocks", **settings)
        assert layers_of(method) == [PagedLayer(layer, 0, ring=ring) for layer in range(LAYERS)]


@pytest.mark.parametrize("method", [kvtrain.Full(), kvtrain.LCKV(kv_map="0s_1", sliding_window=6)], ids=str)
def test_hosts_that_slide_are_refused(method):
    with pytest.raises(ValueError, match="a host with sliding layers is not served by vLLM; use kvtrain generate"):
        paged_layers(kvtrain.retrofit(make_host("qwen2_sliding"), method).config)


def test_a_model_of_our_own_has_no_layers_of_blocks():
    assert paged_layers(kvtrain.TransNormerConfig()) == []
