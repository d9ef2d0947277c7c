"""Every test of transformers that fails on a model of ours, and why. What fails and is not here is a defect."""

from dataclasses import dataclass
from typing import Literal

RETROFITS = ("full", "dmc", "lckv", "duo")
OURS = (*RETROFITS, "transnormer")

# These ask for attention weights on the way to something else, and test the rest where they are told of none.
BY_THE_WAY = (
    "test_assisted_decoding_matches_greedy_search_0_random",
    "test_assisted_decoding_matches_greedy_search_1_same",
    "test_assisted_decoding_sample",
    "test_beam_sample_generate_dict_output",
    "test_beam_search_generate_dict_output",
    "test_beam_search_generate_dict_outputs_use_cache",
    "test_greedy_generate_dict_outputs",
    "test_greedy_generate_dict_outputs_use_cache",
    "test_model_outputs_equivalence",
    "test_retain_grad_hidden_states_attentions",
    "test_sample_generate_dict_output",
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
        generation: Whether they are ``GenerationTesterMixin``'s, and so not always there.
    """

    kind: Literal["refusal", "internals"]
    why: str
    says: str
    subjects: tuple[str, ...]
    tests: tuple[str, ...]
    covered: str = ""
    generation: bool = False


TABLE: tuple[Known, ...] = ()


def known_failures(subject: str) -> dict[str, Known]:
    """By test, what is known of a model."""
    return {test: known for known in TABLE if subject in known.subjects for test in known.tests}
