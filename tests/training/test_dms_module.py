"""Learning what to mark: what trains, from whom, towards which target, and what comes out."""

from types import SimpleNamespace

import pytest
import torch

import kvtrain
from kvtrain.export.hf import export_run
from kvtrain.losses.distillation import Distillation
from kvtrain.models.checkpoint import read_checkpoint
from kvtrain.models.dms import DMS
from kvtrain.models.dms.attention import DMSStep
from kvtrain.models.gating import borrowed_parameters
from kvtrain.training import DMSModule, Phase
from kvtrain.training.teachers import teach
from tests.hosts import dms_at_rate, make_host, random_ids

from .tiny_runs import make_rows, table, train

LOOK = {"limit_val_batches": 1.0, "val_check_interval": 3}
CHANNEL = {"decide_by": "query_channel", "trainable": "all"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_host("qwen3", dtype=torch.float32, tie_word_embeddings=True).save_pretrained(folder)
    return str(folder)


def module_on(base, phases=(("retrofit", 6), ("finetune", 3)), learning_rate=1e-3, training=None, **settings):
    method = DMS(**{"compression": 4.0, "window": 4, "init_bias": 1.0, **settings})
    phases = [Phase(name, steps, learning_rate) for name, steps in phases]
    return DMSModule(base, method, phases=phases, seed=3, **(training or {}))


def adapters(state):
    return {name for name in state if "dms_proj_alpha" in name}


def test_adapters_train_and_nothing_else(base, rows, tmp_path):
    """T23: after nine steps every tensor of the base has the bits that it had; norms and projections have moved."""
    module = module_on(base)
    train(module, rows, tmp_path, 9, **LOOK)
    untouched, found = kvtrain.load(base, dtype=torch.float32).state_dict(), module.model.state_dict()
    assert found.keys() - untouched.keys() == adapters(found) and len(adapters(found)) == 4
    for name, tensor in untouched.items():
        assert torch.equal(found[name], tensor), name
    for name in adapters(found):
        assert (found[name] != (1.0 if "norm" in name else 0.0)).any(), name
    logged = table(tmp_path / "metrics.csv")
    assert logged[0]["compression_target"] == 1.0 and logged[8]["compression_target"] == 4.0
    assert all(row["compression"] >= 1.0 for row in logged) and logged[-1]["val_compression"] > 1.0
    assert (tmp_path / "head_compression.csv").is_file()


def test_all_weights_train_where_that_is_wanted(base, rows, tmp_path):
    """The untouched base teaches then: a second copy, which no step moves and no checkpoint holds."""
    module = module_on(base, trainable="all")
    train(module, rows, tmp_path, 3)
    teacher, untouched = module.teacher_model(), kvtrain.load(base, dtype=torch.float32).state_dict()
    assert teacher is not module.model and not any(p.requires_grad for p in teacher.parameters())
    found = module.model.state_dict()
    for name, tensor in untouched.items():
        assert torch.equal(teacher.state_dict()[name], tensor) and not torch.equal(found[name], tensor), name
    assert module.frozen_base() is None and not [name for name in module.state_dict() if "teacher" in name]


def test_the_target_is_linear_in_the_compression(base):
    module = module_on(base, (("retrofit", 238), ("finetune", 2)), compression=8.0)
    targets = [module.target(module.schedule.phase_step(step)) for step in range(240)]
    assert targets[0] == 1.0 and targets[34] == 2.0 and targets[7 * 17] == 4.5
    assert targets[238:] == [8.0, 8.0] and targets == sorted(targets)


@pytest.mark.parametrize(
    ("phases", "settings", "words"),
    [
        ((("warmup", 5),), {}, "zero_out, retrofit, finetune, in that order; the recipe has warmup"),
        ((("finetune", 5), ("retrofit", 5)), {}, "in that order"),
        ((("zero_out", 5), ("retrofit", 5)), {}, "adapters borrow no channel; leave the phase zero_out out"),
        ((("retrofit", 5),), {"decide_by": "query_channel"}, "set the method's trainable to all"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(base, phases, settings, words):
    with pytest.raises(ValueError, match=words):
        module_on(base, phases, **settings)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_loss_is_the_divergence_from_the_model_that_marks_nothing(base, rows, direction):
    """T22: by hand from both models' logits, over tokens that have labels; the reverse one is the default."""
    distill = True if direction == "reverse" else Distillation(direction=direction)
    module = module_on(base, training={"distill": distill})
    assert module.distillation.direction == direction
    model = module.model = dms_at_rate(make_host("qwen3", dtype=torch.float32), 0.7, window=3).train()
    batch = rows.batch(torch.arange(4).numpy())
    known = {name: batch[name] for name in ("document_ids", "position_ids")}
    step = DMSStep(seed=3, step=5, row_ids=batch["row_ids"])
    _, kwargs = module.teacher_inputs(batch)
    summed = {"labels": batch["labels"], "num_items_in_batch": 1, "use_cache": False}
    loss = model(batch["input_ids"], step=step, **known, **summed, **kwargs).loss
    with torch.no_grad():
        student = model(batch["input_ids"], step=step, use_cache=False, **known).logits
        teacher = model.eval()(batch["input_ids"], step=DMSStep(full_attention=True), use_cache=False, **known).logits
    counted = batch["labels"][:, 1:] != -100
    p, q = (states[:, :-1][counted].double().log_softmax(-1) for states in (student, teacher))
    first, second = (p, q) if direction == "reverse" else (q, p)
    expected = (first.exp() * (first - second)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and expected > 1e-3
    same = {**kwargs, "teacher": teach(model.train(), batch, step=step)}
    assert abs(model(batch["input_ids"], step=step, **known, **summed, **same).loss.item()) < 1e-4


def test_the_first_step_is_the_teacher_but_for_noise(base, rows, tmp_path):
    """Zeros decide by noise alone: about one token in 150 is marked, and the divergence is next to nothing."""
    module = module_on(base, init_bias=5.0)
    train(module, rows, tmp_path, 1)
    (logged,) = table(tmp_path / "metrics.csv")
    assert abs(logged["loss"]) < 1e-3 and 1.0 <= logged["compression"] < 1.04
    still = module_on(base, init_bias=500.0)
    train(still, rows, tmp_path / "still", 1)
    assert abs(table(tmp_path / "still" / "metrics.csv")[0]["loss"]) < 1e-6


def test_noise_belongs_to_seed_step_and_row(base, rows):
    """T24: the same decisions wherever a row stands and whatever is recomputed, other ones in another step."""
    model = dms_at_rate(make_host("qwen3", dtype=torch.float32), 0.5, window=3).train()
    ids, gradients = random_ids(1, 40).expand(3, -1), []

    def decisions(rows, step=7, seed=1):
        outputs = {}
        told = DMSStep(seed=seed, step=step, row_ids=torch.tensor(rows))
        loss = model(ids, labels=ids, outputs=outputs, step=told).loss
        found = torch.stack(list(outputs.values()))
        model.zero_grad()
        (loss + found.mean()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        return found.detach()

    plain = decisions([4, 9, 2])
    assert torch.equal(plain, decisions([2, 9, 4]).flip(1))
    assert not torch.equal(plain[:, 0], plain[:, 1])
    assert not torch.equal(plain, decisions([4, 9, 2], step=8)) and not torch.equal(plain, decisions([4, 9, 2], seed=2))
    model.gradient_checkpointing_enable()
    assert torch.equal(plain, decisions([4, 9, 2]))
    for ours, expected in zip(gradients[-1], gradients[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_a_resumed_run_is_the_run(base, rows, tmp_path):
    """T24 again: a checkpoint holds adapters alone, and going on from it ends on the same bits."""
    whole = module_on(base)
    train(whole, rows, tmp_path / "whole", 9)
    half = module_on(base)
    trainer = train(half, rows, tmp_path / "half", 4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    stored = read_checkpoint(tmp_path / "half.ckpt")["state_dict"]
    assert adapters(stored) == stored.keys() and len(stored) == 4
    resumed = module_on(base)
    train(resumed, rows, tmp_path / "resumed", 9, ckpt_path=tmp_path / "half.ckpt")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_an_export_puts_adapters_into_the_base_again(base, rows, tmp_path):
    module = module_on(base, learning_rate=0.01)
    trainer = train(module, rows, tmp_path / "run", 9)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    served = kvtrain.load(export_run(tmp_path / "last.ckpt", tmp_path / "out", dtype="float32"))
    assert served.method == module.method and type(served).__name__ == "KVQwen3ForCausalLM"
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = module.model.eval()(ids, use_cache=False).logits
        cache = served.make_cache()
        logits = [served(part, past_key_values=cache).logits for part in ids.split([25, 15], 1)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=0)
    assert cache.kv_tokens().float().mean() < 40
    assert served.generate(ids, max_new_tokens=5, do_sample=False).shape == (2, 45)


def test_a_channel_is_freed_and_then_decides(base, rows, tmp_path):
    """Its factor falls to 0, its rows are cleared with the next phase, and learn from there."""
    module = module_on(base, (("zero_out", 4), ("retrofit", 4)), init_bias=0.5, **CHANNEL)
    scales = [module.channel_scale(module.schedule.phase_step(step)) for step in range(8)]
    assert scales == [1.0, 0.75, 0.5, 0.25, None, None, None, None]
    assert [module.target(module.schedule.phase_step(step)) for step in (0, 3, 4, 6)] == [1.0, 1.0, 1.0, 2.5]
    seen = []

    def note(model, args, kwargs):
        rows = [parameter[where] for parameter, where in borrowed_parameters(model)]
        seen.append((max(row.abs().max().item() for row in rows), kwargs["outputs"]))

    module.configure_model = lambda: None
    module.model = module.build_model().train()
    module.model.register_forward_pre_hook(note, with_kwargs=True)
    train(module, rows, tmp_path, 8)
    largest, outputs = zip(*seen, strict=True)
    assert largest[3] > 0.01 and largest[4] == 0.0 and largest[5] > 0
    assert [bool(decisions) for decisions in outputs] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_clearing_the_rows_of_a_freed_channel_changes_nothing(family):
    """And a channel that is not freed is another than the last of a group's first head."""
    model, ids = kvtrain.retrofit(make_host(family), DMS(init_bias=1e3, **CHANNEL)), random_ids(2, 30)
    with torch.no_grad():
        freed = model(ids, use_cache=False, step=DMSStep(channel_scale=0.0)).logits
        whole = model(ids, use_cache=False, step=DMSStep(channel_scale=1.0)).logits
        assert (freed - whole).abs().max() > 1e-6
        for parameter, where in borrowed_parameters(model):
            assert len(parameter[where]) == 2
            parameter[where] = 0
        for step in (DMSStep(channel_scale=0.0), DMSStep(full_attention=True), None):
            torch.testing.assert_close(model(ids, use_cache=False, step=step).logits, freed, atol=1e-12, rtol=0)


def test_what_a_step_says(base, rows):
    module = module_on(base)
    module.trainer = SimpleNamespace(validating=False, global_step=3, strategy=None)
    batch = rows.batch(torch.arange(2).numpy())
    step = module.model_arguments(batch)["step"]
    assert (step.seed, step.step, step.compression, step.channel_scale) == (3, 3, 2.5, None)
    assert torch.equal(step.row_ids, batch["row_ids"]) and not step.full_attention
