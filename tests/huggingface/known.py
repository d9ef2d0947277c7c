"""Every test of transformers that fails on a model of ours, and why. What fails and is not here is a defect."""

import functools
import re
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest

RETROFITS = ("full", "experts", "dmc", "dms", "lckv", "duo", "hybrid")
OURS = (*RETROFITS, "transnormer")

ASSISTED = (
    "test_assisted_decoding_matches_greedy_search_0_random",
    "test_assisted_decoding_matches_greedy_search_1_same",
    "test_assisted_decoding_sample",
)

# These ask for attention weights on the way to something else, and test the rest where they are told of none.
ASK_FOR_WEIGHTS = (
    *ASSISTED,
    "test_beam_sample_generate_dict_output",
    "test_beam_search_generate_dict_output",
    "test_beam_search_generate_dict_outputs_use_cache",
    "test_greedy_generate_dict_outputs",
    "test_greedy_generate_dict_outputs_use_cache",
    "test_model_outputs_equivalence",
    "test_retain_grad_hidden_states_attentions",
    "test_sample_generate_dict_output",
)

# These choose an implementation of attention on the way, and get ours in place of a refusal.
CHOOSE_ATTENTION = (
    *ASSISTED,
    "test_attention_outputs",
    "test_eager_padding_matches_padding_free_with_position_ids",
    "test_generate_compilation_all_outputs",
    "test_retain_grad_hidden_states_attentions",
    "test_sliding_window_mask",
)


@dataclass(frozen=True)
class Known:
    """Tests that fail for one reason.

    Attributes:
        kind: ``"refusal"``: the model says that it does not do this; ``"internals"``: the test looks into how the
            host is made, not at what it does.
        why: The reason.
        says: What the failure's message must match.
        subjects: The models.
        tests: Names.
        covered: For internals, the test of ours that covers the behaviour, ``file::name``.
    """

    kind: Literal["refusal", "internals"]
    why: str
    says: str
    subjects: tuple[str, ...]
    tests: tuple[str, ...]
    covered: str = ""


def refusal(why: str, says: str, subjects: tuple[str, ...], *tests: str) -> Known:
    """What a model does not do, and says so."""
    return Known("refusal", why, says, subjects, tests)


def internals(why: str, says: str, covered: str, subjects: tuple[str, ...], *tests: str) -> Known:
    """What a model does in another way than its host."""
    return Known("internals", why, says, subjects, tests, covered)


WEIGHTS = ("attention weights are never materialised", "set output_attentions=False")

MODEL = (
    refusal(*WEIGHTS, OURS, "test_attention_outputs"),
    refusal(*WEIGHTS, RETROFITS, "test_capture_outputs_decorator"),
    refusal(*WEIGHTS, ("dmc", "dms", "experts", "hybrid"), "test_sliding_window_mask"),
    refusal(
        "attention is the method's own, and no other is to be had",
        "would do nothing",
        RETROFITS,
        "test_can_set_attention_dynamically",
    ),
    refusal(
        "a folder of the plain host is retrofitted, not opened",
        "names no host",
        RETROFITS,
        "test_correct_missing_keys",
    ),
    refusal(
        "states between layers that iterate have no single value",
        "lies between layers that iterate",
        ("lckv",),
        "test_can_capture_specific_layers_hidden_states",
    ),
    refusal(
        "reentrant checkpointing loses the gradients of what layers hand over beside their hidden states",
        "use_reentrant=False",
        ("experts", "dmc", "dms", "lckv"),
        "test_training_gradient_checkpointing_use_reentrant_true",
    ),
    internals(
        "a choice of attention is to reach the host's configuration, and the model refuses any",
        "Unexpected attn_implementation",
        "tests/models/test_contract.py::test_another_attention_is_refused",
        RETROFITS,
        "test_config_attn_implementation_setter",
    ),
    internals(
        "two layers are allowed, and lckv-w2 has one of its own at each end",
        "assert 4 <= 2",
        "tests/models/test_lckv_forms.py::test_enough_passes_are_token_by_token",
        ("lckv",),
        "test_num_layers_is_small",
    ),
    internals(
        "buffers are to come out of two initializations alike, and the reflection is drawn",
        "not properly handled in `_init_weights",
        "tests/models/test_transnormer_heads.py::test_initial_angles_and_reflections",
        ("transnormer",),
        "test_init_weights_can_init_buffers",
    ),
)

GENERATION = (
    refusal(
        "of masks, those of padding alone are honoured",
        "pass the padding mask",
        RETROFITS,
        "test_custom_4d_attention_mask",
    ),
    refusal(
        "the cache is the model's own, not a static one",
        "brings its own cache",
        RETROFITS,
        "test_generate_compilation_all_outputs",
        "test_generate_from_inputs_embeds_with_static_cache",
        "test_generate_with_static_cache",
        "test_static_cache_no_recompile_with_smaller_length",
    ),
    refusal(
        "what has been merged cannot be taken back",
        "assisted decoding must take tokens back",
        ("dmc", "dms", "lckv", "hybrid", "transnormer"),
        *ASSISTED,
    ),
    internals(
        "it compares a DynamicCache with a static one",
        "False is not true",
        "tests/models/test_generation.py::test_outputs_are_those_without_a_cache",
        RETROFITS,
        "test_generate_compile_model_forward_fullgraph",
    ),
    internals(
        "it looks for GenerationMixin among the class's own bases; the host's class has it",
        "False is not true",
        "tests/models/test_generation.py::test_outputs_are_those_without_a_cache",
        RETROFITS,
        "test_inherits_generation_mixin",
    ),
)

TABLE = (*MODEL, *GENERATION)


def known_failures(subject: str) -> dict[str, Known]:
    """By test, what is known of a model."""
    return {test: known for known in TABLE if subject in known.subjects for test in known.tests}


def must_fail(test: Callable[[Any], None], known: Known) -> Callable[[Any], None]:
    """A test of the table: it fails with the words that stand there, or the table is wrong."""

    @functools.wraps(test)
    def held(self: unittest.TestCase) -> None:
        try:
            test(self)
        except unittest.SkipTest as skipped:
            raise AssertionError(f"known.py says that this fails, and it is skipped: {skipped}") from skipped
        except Exception as error:
            if not re.search(known.says, str(error)):
                raise
        else:
            raise AssertionError(f"this passes now; take it out of known.py, where it stands because {known.why}")
        pytest.xfail(f"{known.kind}: {known.why}")

    return held
