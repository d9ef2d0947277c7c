"""Learning gates: what trains, from what, what a checkpoint holds, and what comes out."""

import json

import pytest
import torch

import kvtrain
from kvtrain.data.packing import IGNORE_INDEX
from kvtrain.export.hf import export_run
from kvtrain.kernels.distillation import TeacherHead
from kvtrain.losses.distillation import Distillation, distillation_sum
from kvtrain.losses.gate_regularization import sparsity_penalty
from kvtrain.models.checkpoint import read_checkpoint
from kvtrain.models.duo.convert import gates_of
from kvtrain.models.duo.gates import choose_full_heads
from kvtrain.training import DuoModule, Phase
from kvtrain.training.duo import receptive_field
from tests.hosts import VOCAB, make_host, random_ids

from .tiny_runs import make_rows, table, train

WINDOW = {"sink": 1, "recent": 4}
LOOK = {"limit_val_batches": 1.0, "val_check_interval": 4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_host("qwen3", dtype=torch.float32, layers=2).save_pretrained(folder)
    return str(folder)


def module_on(base, steps=8, learning_rate=0.02, training=None, **settings):
    method = kvtrain.Duo(**{**WINDOW, **settings})
    return DuoModule(base, method, phases=[Phase("gates", steps, learning_rate)], seed=3, **(training or {}))


def answers(length=40, first=33):
    """A batch of whole rows with labels at their end."""
    ids = random_ids(2, length, seed=5)
    labels = ids.clone()
    labels[:, :first] = IGNORE_INDEX
    return {
        "input_ids": ids,
        "labels": labels,
        "document_ids": torch.ones_like(ids),
        "position_ids": torch.arange(length).expand_as(ids).contiguous(),
        "row_ids": torch.arange(2),
        "num_items": (labels[:, 1:] != IGNORE_INDEX).sum(),
    }


@pytest.mark.parametrize(
    "settings", [{}, {"mixing": "teacher"}, {"gates": "hard_concrete"}], ids=["self", "teacher", "hard concrete"]
)
def test_gates_train_and_nothing_else(base, rows, tmp_path, settings):
    module = module_on(base, **settings)
    train(module, rows, tmp_path, 8)
    untouched = kvtrain.load(base, dtype=torch.float32).state_dict()
    found = module.model.state_dict()
    for name, tensor in untouched.items():
        assert torch.equal(found[name], tensor), name
    gates = torch.stack([found[name] for name in found if name.endswith(".gates")])
    assert (gates != (4.5 if "gates" in settings else 1.0)).all()
    moments = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert set(moments) - {name for name in moments if name.endswith(".gates")} <= {"multipliers"}


def test_the_first_step_knows_no_distance(base, rows, tmp_path):
    """Open gates are the teacher: the loss is 0, and only their size pulls, at all alike."""
    module = module_on(base)
    train(module, rows, tmp_path, 1)
    assert abs(table(tmp_path / "metrics.csv")[0]["loss"]) < 1e-10
    gates = gates_of(module.model)
    assert torch.allclose(gates, gates[0, 0].expand_as(gates)) and gates[0, 0] < 1


def test_gates_stay_between_0_and_1(base, rows, tmp_path):
    """Pulled hard, they stop at 0 and can come back."""
    module = module_on(base, steps=12, learning_rate=0.5, training={"regularization": 5.0})
    train(module, rows, tmp_path, 12)
    stored = torch.stack([layer.self_attn.gates for layer in module.model.model.layers])
    assert (stored >= -0.51).all()  # one step beyond at most
    assert gates_of(module.model).min() == 0


@pytest.mark.parametrize("length", [40, 90])
def test_a_student_reads_what_its_answers_depend_on(base, length):
    """Loss and gradients are those of the whole rows; one column fewer is not enough."""
    module = module_on(base, mixing="teacher")
    module.configure_model()
    module.trainer = Trainer()
    for number, layer in enumerate(module.model.model.layers):
        layer.self_attn.gates.data = torch.tensor([0.3, 0.8]) + 0.1 * number
    batch = answers(length, first=length - 5)
    columns = receptive_field(batch, module.method, layers=2)
    assert columns.numel() == 1 + 3 * 2 + 1 + 5

    def outcome(kept):
        module.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvtrain.training.duo.receptive_field", lambda *_: kept)
            read, told = module.teacher_inputs(batch)
            arguments = {**module.model_arguments(read), **told}
            loss = module.model(read["input_ids"], labels=read["labels"], use_cache=False, **arguments).loss
            loss.backward()
        return torch.cat([loss.detach()[None], *(layer.self_attn.gates.grad for layer in module.model.model.layers)])

    whole = outcome(slice(None))
    torch.testing.assert_close(outcome(columns), whole, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(outcome(torch.cat([columns[:1], columns[2:]])), whole, rtol=1e-4)


class Trainer:
    """As much of a trainer as a training step asks for."""

    global_step, validating, world_size, accumulate_grad_batches = 0, False, 1, 1


def test_rows_of_several_documents_are_read_whole():
    batch = answers()
    batch["document_ids"][:, 20:] = 2
    assert receptive_field(batch, kvtrain.Duo(**WINDOW), layers=2) == slice(None)
    assert receptive_field(answers(12, 8), kvtrain.Duo(**WINDOW), layers=2) == slice(12)


@pytest.mark.parametrize("heads", [None, 1])
def test_a_checkpoint_holds_the_gates_alone_and_an_export_everything(base, rows, tmp_path, heads):
    """The rounded model is the one that validation measured, on the base as it is or with fewer heads."""
    run, exported = tmp_path / "run", tmp_path / "exported"
    module = module_on(base, steps=8, training={"num_key_value_heads": heads})
    train(module, rows, run, 8, enable_checkpointing=True, **LOOK)
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    assert set(checkpoint["state_dict"]) == {f"model.model.layers.{layer}.self_attn.gates" for layer in (0, 1)}
    assert path.stat().st_size < 32_000
    export_run(run, exported, dtype="float32")
    model = kvtrain.load(str(exported), dtype=torch.float32).eval()
    assert model.method.full_heads == choose_full_heads(gates_of(module.model), 0.5)
    ids = random_ids(2, 30)
    module.model.eval()
    module.model.binarize()
    with torch.no_grad():
        expected = module.model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=True).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_export_wants_the_base_that_was_trained_on(base, rows, tmp_path):
    module = module_on(base, steps=2)
    train(module, rows, tmp_path, 2, enable_checkpointing=True)
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    settings = json.loads(checkpoint["kvtrain_export"])
    other = tmp_path / "other"
    make_host("qwen3", dtype=torch.float32, layers=1).save_pretrained(other)
    checkpoint["kvtrain_export"] = json.dumps({**settings, "base": str(other)})
    torch.save(checkpoint, path.resolve())
    (path.parent / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not the base that was trained on"):
        export_run(tmp_path, tmp_path / "exported")


def test_resumed_gates_are_the_same_to_the_bit(base, rows, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    one, two = (module_on(base, gates="hard_concrete") for _ in range(2))
    train(one, rows, whole, 8)
    train(module_on(base, gates="hard_concrete"), rows, halves, 4, enable_checkpointing=True)
    train(two, rows, halves, 8, ckpt_path=halves / "checkpoints" / "last.ckpt", enable_checkpointing=True)
    assert torch.equal(gates_of(one.model), gates_of(two.model))
    assert torch.equal(one.multipliers, two.multipliers)


def test_gates_lie_in_the_run_folder(base, rows, tmp_path):
    train(module_on(base), rows, tmp_path, 8, **LOOK)
    written = table(tmp_path / "head_gates.csv")
    assert [(row["step"], row["layer"], row["head"]) for row in written] == [
        (step, layer, head) for step in (3, 7) for layer in (0, 1) for head in (0, 1)
    ]
    assert all(sum(row["full"] for row in written if row["step"] == step) == 2 for step in (3, 7))


def test_a_sparsity_is_met_by_multipliers_that_climb(base, rows, tmp_path):
    """The penalty's gradient moves the multipliers up where gates are too open."""
    train(module_on(base, steps=120, learning_rate=0.3, gates="hard_concrete"), rows, tmp_path, 120)
    found = table(tmp_path / "metrics.csv")
    assert found[-1]["sparsity_target"] == 0.5
    assert abs(sum(row["sparsity"] for row in found[-20:]) / 20 - 0.5) < 0.1
    multipliers = torch.tensor([2.0, 3.0])
    assert sparsity_penalty(torch.tensor(0.7), 0.5, multipliers).item() == pytest.approx(2 * 0.2 + 3 * 0.04)


def test_the_published_schedule():
    """Flat at a tenth, up to 0.02 at step 400, down to 0.002 over the last 400."""
    phase = Phase("gates", 2000, 0.02, 0.002, 400, decay_steps=400, initial_learning_rate=0.002)
    for step in range(2000):
        published = 0.02 * min(1, max((step + 1) / 400, 0.1), max((2000 - step) / 400, 0.1))
        assert phase.learning_rate_at(step) == pytest.approx(published, abs=1e-12), step
    assert phase.learning_rate_at(1999) == 0.002


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decay_steps": 0, "final_learning_rate": 0.1}, "decay_steps must be"),
        ({"decay_steps": 8, "final_learning_rate": 0.1, "warmup_steps": 3}, "decay_steps must be"),
        ({"decay_steps": 2}, "needs final_learning_rate"),
        ({"initial_learning_rate": 2.0}, "initial_learning_rate must be"),
    ],
)
def test_schedules_that_mean_nothing(wrong, message):
    with pytest.raises(ValueError, match=message):
        Phase(**{"name": "x", "steps": 10, "learning_rate": 1.0, **wrong})


def test_hidden_states_as_the_target():
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    head = torch.randn(VOCAB, 4, generator=generator, dtype=torch.float64)
    targets = torch.tensor([1, -100, 2, 3, -100, 4, 5])
    loss, parts = distillation_sum(hidden, head, TeacherHead(teacher, head), targets, Distillation(of="hidden"))
    counted = targets != IGNORE_INDEX
    assert loss.item() == pytest.approx((hidden - teacher)[counted].square().mean(-1).sum().item()) and not parts
    mixed, parts = distillation_sum(
        hidden, head, TeacherHead(teacher, head), targets, Distillation(of="hidden", weight=0.25)
    )
    cross_entropy = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    assert mixed.item() == pytest.approx(0.25 * loss.item() + 0.75 * cross_entropy.item())
    with pytest.raises(ValueError, match="of: logits"):
        distillation_sum(hidden, head, TeacherHead(teacher[:, :3], head), targets, Distillation(of="hidden"))
    with pytest.raises(ValueError, match="use logits or hidden"):
        Distillation(of="nothing")


@pytest.mark.parametrize(
    ("settings", "training", "message"),
    [
        ({"full_heads": [[0], [1]]}, {}, "leave it out"),
        ({}, {"regularization": -1.0}, "must not be negative"),
    ],
)
def test_bad_settings(base, settings, training, message):
    with pytest.raises(ValueError, match=message):
        module_on(base, training=training, **settings)
