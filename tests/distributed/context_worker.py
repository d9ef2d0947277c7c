"""One of two ranks that share rows: ``python -m tests.distributed.context_worker 2 FOLDER``.

Every case is computed whole, and in parts; rank 0 leaves how far apart both are, in float64.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvtrain
from kvtrain.kernels.context_parallel import WHOLE_ROWS
from kvtrain.kernels.ulysses import Ulysses
from kvtrain.losses.compression import compressed_fraction, compression_hinge
from kvtrain.losses.distillation import Distillation
from kvtrain.models.context import LayerOutputs
from kvtrain.models.dmc.attention import DMCStep
from kvtrain.models.dms.attention import DMSStep
from kvtrain.models.duo.attention import DuoStep
from kvtrain.models.gating import has_choice
from kvtrain.training.teachers import teach
from tests.hosts import make_host, random_adapters, random_ids, with_random_mixers

FULL = kvtrain.Full()
# Documents that begin and end in either half and across both, and padding; rows of 24 tokens.
DOCUMENTS = torch.tensor([[1] * 5 + [2] * 12 + [3] * 2 + [0] * 5, [1] * 24, [1] * 11 + [2] + [3] * 12])
PADDED = torch.tensor([[1] * 9 + [0] * 15, [1] * 24, [1] * 23 + [0]])
NOISE = {"seed": 3, "step": 5, "row_ids": torch.tensor([4, 9, 2])}
HEAD_GATES = torch.tensor([0.1, 0.9, 0.6, 0.3])


def packed(**more: Any) -> dict[str, Any]:
    return {"document_ids": DOCUMENTS, **more}


@dataclass(frozen=True)
class Case:
    """A model, and what its forward pass is told.

    Attributes:
        method: In it.
        told: Arguments of the pass.
        host: Of the model.
        teacher: Whether it learns from another host, or from itself in this form.
        distillation: How.
        hinge: Whether decisions are pulled to a target.
        training: Of the model.
        prepare: Called with the model.
    """

    method: Any = FULL
    told: dict[str, Any] = field(default_factory=packed)
    host: dict[str, Any] = field(default_factory=dict)
    teacher: DuoStep | DMSStep | bool = False
    distillation: Distillation | None = None
    hinge: bool = False
    training: bool = True
    prepare: Callable[[Any], Any] = lambda model: model


def with_gates(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.gates.data.copy_(HEAD_GATES)
    return model


def dmc(case: dict[str, Any], **settings: Any) -> Case:
    method = kvtrain.DMC(**{"compression": 4.0, "window": 3, "init_bias": 0.0, "temperature": 0.7, **settings})
    return Case(method, hinge=True, **case)


def dms(case: dict[str, Any] | None = None, **settings: Any) -> Case:
    method = kvtrain.DMS(**{"compression": 4.0, "window": 3, "init_bias": 0.0, "temperature": 0.7, **settings})
    usual = {"told": packed(step=DMSStep(**NOISE)), "host": {"family": "qwen3"}, "prepare": random_adapters}
    return Case(method, hinge=True, **{**usual, **(case or {})})


def duo(case: dict[str, Any] | None = None, **settings: Any) -> Case:
    usual = {"told": packed(step=DuoStep(seed=3, step=5)), "prepare": with_gates}
    return Case(kvtrain.Duo(sink=1, recent=4, **settings), **{**usual, **(case or {})})


def hybrid(case: dict[str, Any] | None = None, **settings: Any) -> Case:
    usual = {"host": {"family": "qwen3"}, "prepare": with_random_mixers}
    return Case(kvtrain.Hybrid(**settings), **{**usual, **(case or {})})


NOISY = {"told": packed(step=DMCStep(**NOISE))}
HIDDEN, MIXED = Distillation(of="hidden"), Distillation(weight=0.3, temperature=2.0)
SINKS = {"family": "gpt_oss", "router_aux_loss_coef": 0.0}
CASES = {
    "full": Case(),
    "full, one document a row": Case(told={}),
    "full, padded rows": Case(told={"attention_mask": PADDED}),
    "full, positions that restart": Case(told={"position_ids": torch.arange(24).remainder(7).expand(3, -1)}),
    "full, biases": Case(host={"family": "qwen2"}),
    "full, windows": Case(host={"family": "qwen2_sliding"}),
    "full, norms of each head": Case(host={"family": "qwen3"}),
    "full, norms of all heads": Case(host={"family": "olmo2"}),
    "full, learned sinks": Case(host=SINKS),
    "full, a second model teaches logits": Case(teacher=True, distillation=MIXED),
    "full, a second model teaches hidden states": Case(teacher=True, distillation=HIDDEN),
    "full, evaluated in 8 bits": Case(kvtrain.Full(kv_bits=8), training=False),
    "dmc": dmc(NOISY),
    "dmc, checkpointed": dmc({**NOISY, "prepare": lambda model: model.gradient_checkpointing_enable()}),
    "dmc, without noise": dmc({"told": packed(step=DMCStep())}),
    "dmc, zero-out": dmc({"told": packed(step=DMCStep(channel_scale=0.3))}),
    "dmc, shared decisions": dmc(NOISY, shared_decisions=True),
    "dmc, random decisions": dmc({"told": packed(step=DMCStep(**NOISE, compression=2.0))}, decisions="random"),
    "dmc, evaluated": dmc({"training": False}),
    "dmc, random decisions, evaluated": dmc({"training": False}, decisions="random"),
    "dmc, a second model teaches": dmc({**NOISY, "teacher": True, "distillation": Distillation()}),
    "dms": dms(),
    "dms, shared decisions": dms(shared_decisions=True),
    "dms, evaluated": dms({"training": False}),
    "dms, teaches itself": dms({"teacher": DMSStep(full_attention=True), "distillation": Distillation()}),
    "dms, a query channel": dms({"prepare": lambda model: model}, decide_by="query_channel"),
    "duo": duo(),
    "duo, compensation": duo(compensation=True),
    "duo, hard-concrete": duo(gates="hard_concrete"),
    "duo, teaches itself": duo({"teacher": DuoStep(full_attention=True), "distillation": HIDDEN}),
    "duo, mixes its teacher in": duo(
        {"teacher": DuoStep(full_attention=True), "distillation": MIXED}, mixing="teacher", gates="hard_concrete"
    ),
    "duo, rounded": duo({"told": packed(), "prepare": lambda model: with_gates(model).binarize(0.25)}),
    "duo, rounded, learned sinks": duo(
        {"told": packed(), "host": SINKS, "prepare": lambda model: with_gates(model).binarize(0.25)}
    ),
    "duo, gates in place of its own": duo({"told": packed(step=DuoStep(gates={0: HEAD_GATES, 1: HEAD_GATES.round()}))}),
    "hybrid": hybrid(),
    "hybrid, evaluated": hybrid({"training": False}, features="elu", decay="none", gate=False),
    "lckv": Case(
        kvtrain.LCKV(kv_map="0_3_3_3_3", forward_passes=2, backward_passes=3),
        host={"family": "qwen3", "layers": 5},
    ),
    "lckv, residual": Case(kvtrain.LCKV(kv_map="0_1_1_1_4", residual=True), host={"layers": 5}),
}


def answers(case: Case, parallel: Any) -> dict[str, Tensor]:
    """The loss and its gradients by name, summed over the ranks that share the rows."""
    host = make_host(**{"heads": 8, "kv_heads": 4, **case.host})
    model: Any = kvtrain.retrofit(host, case.method)
    model.context_parallel = parallel
    case.prepare(model)
    model.train(case.training)
    ids, told = random_ids(3, 24), dict(case.told)
    batch = {"input_ids": ids, "document_ids": DOCUMENTS, "position_ids": None}
    if case.teacher is True:
        second: Any = kvtrain.retrofit(make_host(heads=8, kv_heads=4, seed=1), kvtrain.Full())
        second.context_parallel = parallel
        told |= {"teacher": teach(second, batch), "distillation": case.distillation}
    elif case.teacher:
        seen = LayerOutputs()
        told |= {"teacher": teach(model, batch, step=case.teacher, outputs=seen), "distillation": case.distillation}
        if getattr(case.method, "mixing", None) == "teacher":
            told["step"] = DuoStep(seed=3, step=5, teacher=dict(seen))
    outputs = LayerOutputs()
    labels = ids.masked_fill(DOCUMENTS == 0, -100)
    labels[1, 2:15] = -100  # a rank has few targets of this row
    told |= {"labels": labels, "num_items_in_batch": 1, "use_cache": False, "skip_logits": True, "outputs": outputs}
    loss = model(ids, **told).loss
    if case.hinge and outputs:
        fractions = compressed_fraction(outputs.values(), has_choice(DOCUMENTS.clone()))
        loss = loss + 10.0 * compression_hinge(fractions, 4.0) / parallel.size
    loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if parallel is not WHOLE_ROWS:
        for value in found.values():
            torch.distributed.all_reduce(value)
    return found


def apart(case: Case, parallel: Any) -> float:
    """The largest difference of a tensor, as a share of its norm; of a gradient that should be nothing, itself."""
    whole, parts = answers(case, WHOLE_ROWS), answers(case, parallel)
    assert whole.keys() == parts.keys()
    assert all(value.dtype in (torch.float64, torch.float32) for value in whole.values())
    return max(float((parts[name] - value).norm() / value.norm().clamp(min=1e-6)) for name, value in whole.items())


def main(world_size: int, folder: Path) -> None:
    """Run every case; rank 0 leaves how far apart its two forms are, or the words of a failure."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    parallel = Ulysses(torch.distributed.new_subgroups(world_size)[0])
    results = {name: apart(case, parallel) for name, case in CASES.items()}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
