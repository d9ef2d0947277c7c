"""What vLLM cannot hold is refused before any weight is read, and the reason is the last thing said."""

from tests.vllm.folders import prompts
from tests.vllm.jobs import refusals, start

SENTENCES = {
    "dmc": "method 'dmc' is not served by vLLM: its heads have different lengths, and vLLM keeps one table of blocks "
    "for all of them; use kvtrain generate",
    "from-above": "kv_map 'lckv-w2' reads keys from above, which takes iteration, and vLLM runs its layers once; serve "
    "it with kvtrain, or retrofit with a map that reads from below, such as 'cla2'",
    "diagonals": "mask_all_diagonals is not served by vLLM, whose tokens see themselves; use kvtrain generate",
    "values": "value_map is not served by vLLM: keys and values of one layer lie in one block",
    "residual": "residual is not served by vLLM",
    "unequal": "full_heads has 0, 1, 2, 1, 1, 1 heads in layers 0, 1, 2, 3, 4, 5: vLLM pads all layers to the largest "
    "and nothing is saved; round with equal counts, or use kvtrain generate",
    "gates": "gates are fractions yet; run kvtrain export, which rounds them",
    "compensation": "compensation is not served by vLLM; use kvtrain generate",
    "bits": "kv_bits is not served by vLLM; use kvtrain generate",
    "h2o": "method 'h2o' is not served by vLLM",
    "sliding": "a host with sliding layers is not served by vLLM; use kvtrain generate",
    "masked": "a masked language model generates no text; open it with kvtrain.load",
}
OPTIONS = {
    "Duo runs on one device; leave out --tensor-parallel-size": ("duo", {"tensor_parallel_size": 2}),
    "TransNormer runs on one device; leave out --pipeline-parallel-size": ("t1", {"pipeline_parallel_size": 2}),
    "Duo is served without LoRA": ("duo", {"enable_lora": True}),
    "TransNormer takes no tokens back in vLLM": (
        "t1",
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
    ),
}


def test_models_and_options_that_are_not_served_are_named():
    wanted = [(name, {}, sentence) for name, sentence in SENTENCES.items()]
    wanted += [(name, options, sentence) for sentence, (name, options) in OPTIONS.items()]
    said = refusals([(name, options) for name, options, _ in wanted])
    assert [sentence in text for text, (_, _, sentence) in zip(said, wanted, strict=True)] == [True] * len(wanted)


def test_the_reason_is_the_last_thing_said_and_no_weight_is_read():
    ended = start("dmc", [prompts()])
    assert ended.returncode != 0
    assert "Loading safetensors" not in ended.stderr
    assert SENTENCES["dmc"] in "\n".join((ended.stdout + ended.stderr).rstrip().splitlines()[-5:])


def test_prefix_caching_of_a_state_is_switched_off_with_a_word():
    ended = start("duo", [prompts()[:1]], enable_prefix_caching=True)
    assert ended.returncode == 0
    said = "Duo is served without prefix caching"
    assert (ended.stdout + ended.stderr).count(said) == 1


def test_without_the_plugin_transformers_says_that_it_knows_no_such_model(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    ended = start("full", [prompts()])
    assert ended.returncode != 0
    assert "model type `kvtrain` but Transformers does not recognize this architecture" in ended.stdout + ended.stderr
