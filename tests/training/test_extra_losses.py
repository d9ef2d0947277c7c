"""A host's own losses in training: their weight under accumulation and on several ranks, and what is logged."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from kvtrain.metrics import read_metrics
from kvtrain.training import Phase, PretrainModule

from .small_runs import HOST, fit, recipe_text

COEFFICIENT = 0.25
# As much of a trainer as a step asks for; ranks are summed by nobody.
STEP = {
    "global_step": 0,
    "should_stop": False,
    "log_every_n_steps": 1,
    "strategy": SimpleNamespace(reduce=lambda tensor, reduce_op: tensor),
}


@pytest.fixture
def host(tmp_path):
    """The configuration file of a host with experts."""
    config = {**HOST, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4}
    config |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": COEFFICIENT}
    (tmp_path / "host.json").write_text(json.dumps(config))
    return tmp_path / "host.json"


def make_batches(module):
    """Three rows of 31, 11 and 17 targets, each a batch of its own that knows the targets of all."""
    batches = []
    for row, length in enumerate((32, 12, 18)):
        ids = torch.randint(3, 4096, (1, 32), generator=torch.Generator().manual_seed(row))
        real = torch.arange(32)[None] < length
        batches.append(
            {
                "input_ids": ids,
                "labels": ids.masked_fill(~real, -100),
                "document_ids": real.long(),
                "position_ids": torch.arange(32)[None],
                "row_ids": torch.tensor([row]),
            }
        )
    items = sum(module.num_targets(batch) for batch in batches)
    return [{**batch, "num_items": items} for batch in batches]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_accumulation_and_ranks_leave_its_weight_alone(host, checkpointing):
    """Gradients of a window are those of the mean over its targets, each with its batch's loss of the routers."""
    phases = [Phase("all", 4, 1e-3)]
    module = PretrainModule(str(host), phases=phases, activation_checkpointing=checkpointing)
    module.configure_model()
    model, batches, logged = module.model.double(), make_batches(module), {}
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    module.log = lambda name, value, **_: logged.setdefault(name, []).append(float(value))

    def gradients(accumulated, ranks):
        """As a trainer makes them: the mean over batches of a window, and over ranks."""
        module.trainer = SimpleNamespace(accumulate_grad_batches=accumulated, world_size=ranks, **STEP)
        losses = [module.training_step(batch, number % accumulated) for number, batch in enumerate(batches)]
        return torch.autograd.grad(sum(losses) / (accumulated * ranks), routers)

    expected = expected_aux = 0
    for batch in batches:
        given = {name: batch[name] for name in ("input_ids", "labels", "document_ids", "position_ids")}
        targets = module.num_targets(batch)
        output = model(**given)
        expected = expected + output.loss * targets / batch["num_items"]
        expected_aux += float(output.loss_parts["aux_loss"] * targets / batch["num_items"])
    expected = torch.autograd.grad(expected, routers)
    for accumulated, ranks in ((3, 1), (1, 3)):
        for ours, naive in zip(gradients(accumulated, ranks), expected, strict=True):
            torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-9)
    assert logged["aux_loss"][0] == pytest.approx(expected_aux, rel=1e-5)
    assert sum(logged["aux_loss"][1:]) == pytest.approx(expected_aux, rel=1e-5)  # a share of each rank
    for loss, cross_entropy, aux_loss in zip(
        *(logged[name] for name in ("loss", "cross_entropy", "aux_loss")), strict=True
    ):
        assert loss == pytest.approx(cross_entropy + COEFFICIENT * aux_loss, rel=1e-5)


def test_a_run_logs_it_and_measures_held_out_tokens_without_it(host, place, tmp_path):
    recipe = yaml.safe_load(recipe_text(place, tmp_path / "run"))
    recipe["model"]["init_args"]["model_config"] = str(host)
    recipe["trainer"] |= {"max_steps": 4, "val_check_interval": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert fit(tmp_path / "recipe.yaml") == 0
    rows = read_metrics(tmp_path / "run")
    steps = [row for row in rows if "aux_loss" in row]
    assert len(steps) == 4
    for row in steps:
        assert 1.9 < row["aux_loss"] < 3.0  # of even routers, as many experts as a token has
        assert row["loss"] == pytest.approx(row["cross_entropy"] + COEFFICIENT * row["aux_loss"], rel=1e-5)
    (held,) = [row["val_loss"] for row in rows if "val_loss" in row]
    assert abs(held - steps[-1]["cross_entropy"]) < abs(held - steps[-1]["loss"])
