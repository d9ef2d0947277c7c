"""Whose distribution a model learns: that of a second model, or its own in another form."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvtrain.data.packing import Batch
from kvtrain.kernels.distillation import TeacherHead
from kvtrain.models.adapters import plain_name
from kvtrain.models.full import Full
from kvtrain.models.host import retrofit


@torch.no_grad()
def teach(model: Any, batch: Batch, **arguments: Any) -> TeacherHead:
    """What a model makes of a batch: its last hidden states ``(B, T, D)``, and the head that stands on them.

    Args:
        model: A second model, or the student itself, whose ``arguments`` then say in which form it teaches.
        batch: Packed rows.
        **arguments: Of its forward pass, such as ``step`` and ``outputs``.
    """
    hidden = model(
        batch["input_ids"],
        document_ids=batch["document_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,
        skip_logits=True,
        **arguments,
    ).last_hidden_state
    return TeacherHead(hidden, model.lm_head)


def sharing(host: PreTrainedModel, model: nn.Module, is_trainable: Callable[[str], bool]) -> PreTrainedModel:
    """The host that a model was made of, so that it can teach: it has copies of what trains, and shares the rest.

    Args:
        host: The host, in place.
        model: Has the very parameters of the host where it changed none.
        is_trainable: Whether the model's parameter of a name trains.
    """
    trained = {plain_name(name) for name, _ in model.named_parameters() if is_trainable(name)}
    for name, parameter in list(host.named_parameters()):
        if name in trained:
            parent, _, last = name.rpartition(".")
            setattr(host.get_submodule(parent), last, nn.Parameter(parameter.detach().clone()))
    return host


def second_model(
    host: PreTrainedModel, device: torch.device, modules: Mapping[str, nn.Module] | None = None
) -> PreTrainedModel:
    """A host as a teacher: on our kernels, on the student's device, and never trained.

    Args:
        host: The host.
        device: Where the student is.
        modules: Of the student, by name, which take the place of the teacher's own.
    """
    teacher: PreTrainedModel = retrofit(host, Full()).requires_grad_(False).eval()
    for name, module in (modules or {}).items():
        teacher.set_submodule(name, module)
    nn.Module.to(teacher, device)
    return teacher
