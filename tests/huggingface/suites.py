"""transformers' mixins in one class, to be run on one model after another."""

import contextlib
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

from tests.huggingface.source import mixin
from tests.huggingface.subjects import SUBJECTS, Tester

ModelTesterMixin = mixin("test_modeling_common", "ModelTesterMixin")
GenerationTesterMixin = mixin("generation.test_utils", "GenerationTesterMixin")
TrainingTesterMixin = mixin("test_training_mixin", "TrainingTesterMixin")


class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """All tests on one model; a subclass names it, and is a ``unittest.TestCase`` too."""

    subject: ClassVar[str]

    def setUp(self) -> None:
        subject = SUBJECTS[self.subject]
        self.model_tester = Tester(subject)
        self.all_model_classes = (subject.model_class,)

    def subTest(self, *_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        """One failure is enough."""
        return contextlib.nullcontext()
