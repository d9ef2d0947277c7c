"""transformers' mixins in one class, to be run on one model after another, and held against the table of failures."""

import contextlib
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from transformers import Cache, PreTrainedConfig

from kvtrain.cache.base import KVCache
from tests.huggingface.known import ASK_FOR_WEIGHTS, CHOOSE_ATTENTION, known_failures, must_fail
from tests.huggingface.source import mixin
from tests.huggingface.subjects import SUBJECTS, Tester

ModelTesterMixin = mixin("test_modeling_common", "ModelTesterMixin")
GenerationTesterMixin = mixin("generation.test_utils", "GenerationTesterMixin")
TrainingTesterMixin = mixin("test_training_mixin", "TrainingTesterMixin")


class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """All of their tests on one model; a subclass names it, and is a ``unittest.TestCase`` too."""

    subject: ClassVar[str]
    training_overfit_steps = 100
    training_overfit_learning_rate = 5e-3
    pytestmark: ClassVar = [pytest.mark.roads]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, known in known_failures(cls.subject).items():
            if hasattr(cls, name):  # test_known.py misses the others
                setattr(cls, name, must_fail(getattr(cls, name), known))

    def setUp(self) -> None:
        subject = SUBJECTS[self.subject]
        self.model_tester = Tester(subject)
        self.all_model_classes = (subject.model_class,)
        if self._testMethodName in CHOOSE_ATTENTION:
            self.enterContext(mock.patch("kvtrain.models.host.check_attention"))

    def subTest(self, *_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        """The first failure is the test's."""
        return contextlib.nullcontext()

    @property
    def has_attentions(self) -> bool:
        """Whether a test may ask for attention weights; one that does so on the way tests the rest without."""
        return self.subject == "host" or self._testMethodName not in ASK_FOR_WEIGHTS

    def prepare_config_and_inputs_for_generate(self, batch_size: int = 2) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """Prompts without padding: what is generated would follow upon the padding on their right."""
        config, inputs = super().prepare_config_and_inputs_for_generate(batch_size)
        return config, {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}

    def _check_hidden_states_for_generate(
        self, batch_size: int, hidden_states: tuple[tuple[torch.Tensor | None, ...], ...], *sizes: Any, **options: Any
    ) -> None:
        """Theirs, of the states that have a single value; None stands for the others."""
        single = tuple(tuple(state for state in step if state is not None) for step in hidden_states)
        missing = {tuple(at for at, state in enumerate(step) if state is None) for step in hidden_states}
        assert missing == {SUBJECTS[self.subject].iterated}
        super()._check_hidden_states_for_generate(batch_size, single, *sizes, **options)

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Cache, seq_length: int, config: PreTrainedConfig
    ) -> None:
        """Theirs is to be replaced where a cache holds no keys and values of one common length."""
        if self.subject == "host":
            super()._check_past_key_values_for_generate(batch_size, past_key_values, seq_length, config)
            return
        assert isinstance(past_key_values, KVCache)
        assert len(past_key_values.layers) == config.num_hidden_layers
        assert (len(past_key_values.tokens), past_key_values.get_seq_length()) == (batch_size, seq_length)

    def _check_caches_are_equal(self, cache1: Cache, cache2: Cache) -> None:
        """As above; what they hold is compared by ``tests/cache``."""
        if self.subject == "host":
            super()._check_caches_are_equal(cache1, cache2)
            return
        assert torch.equal(cache1.tokens, cache2.tokens)
