"""Training with a map: what the run folder says of it, how far serving is from training, and what learns."""

import json

import lightning.pytorch as pl
import pytest
import torch
import yaml

import kvtrain
from kvtrain.cli import main
from kvtrain.metrics import read_metrics
from kvtrain.training import LCKVModule, Phase
from kvtrain.training.lckv import serving_gap
from tests.hosts import make_host, random_ids

from .small_runs import HOST, fit, recipe_text
from .tiny_runs import BATCH, LENGTH, make_rows, table, train

CYCLIC = "0_2_2_3"
EXACT = {"forward_passes": LENGTH - 2, "prefill_block": LENGTH}  # and two passes with gradient
LOOK = {"limit_val_batches": 1.0, "val_check_interval": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random host on disk."""
    folder = tmp_path_factory.mktemp("base")
    make_host("qwen3", dtype=torch.float32, layers=4).save_pretrained(folder)
    return str(folder)


def module_on(base, steps=4, kv_map=CYCLIC, training=None, **settings):
    method = kvtrain.LCKV(kv_map=kv_map, **settings)
    return LCKVModule(base, method, phases=[Phase("train", steps, 3e-3)], seed=3, **(training or {}))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(0, 0, 0), (2, 2, 0), (2, 2, 0), (3, 3, 0)]),
        ({"kv_map": "0s_2s_2s_3"}, [(0, 0, 1), (2, 2, 1), (2, 2, 1), (3, 3, 0)]),
        ({"kv_map": "pizza-bottom", "value_map": "first"}, [(0, 0, 0), (1, 1, 0), (1, 0, 0), (1, 0, 0)]),
    ],
    ids=["cyclic", "sliding", "values apart"],
)
def test_the_map_lies_in_the_run_folder(base, rows, tmp_path, settings, expected):
    train(module_on(base, **settings), rows, tmp_path, 1)
    assert table(tmp_path / "kv_map.csv") == [
        {"layer": layer, "key_layer": key, "value_layer": value, "sliding": sliding}
        for layer, (key, value, sliding) in enumerate(expected)
    ]


def gaps(run):
    return [row["val_serving_gap"] for row in table(run / "metrics.csv") if "val_serving_gap" in row]


def test_the_gap_is_nothing_where_passes_and_blocks_suffice(base, rows, tmp_path):
    train(module_on(base, **EXACT), rows, tmp_path, 4, **LOOK)
    assert len(gaps(tmp_path)) == 2
    assert max(map(abs, gaps(tmp_path))) < 1e-5


def decoded_loss(model, batch):
    """Mean loss over the real tokens behind each row's first, read one by one with a cache."""
    total, targets = 0.0, 0
    for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        ids = ids[documents > 0][None]
        cache = model.make_cache()
        logits = [model(ids[:, at : at + 1], past_key_values=cache).logits[0] for at in range(ids.shape[1] - 1)]
        total += torch.nn.functional.cross_entropy(torch.cat(logits), ids[0, 1:], reduction="sum").item()
        targets += ids.shape[1] - 1
    return total / targets


def test_the_gap_is_decoding_minus_training(base, rows, tmp_path):
    """Of the first held-out batch, every row one document; blocks no longer than the passes are exact."""
    module = module_on(base, forward_passes=1, prefill_block=3)
    trainer = train(module, rows, tmp_path, 2, **LOOK)
    batch = next(iter(trainer.val_dataloaders))
    ids, real = batch["input_ids"], batch["document_ids"] > 0
    assert len(ids) == BATCH
    with torch.no_grad():
        model = module.model.eval()
        trained = model(ids, labels=ids.masked_fill(~real, -100), use_cache=False, skip_logits=True).loss.item()
        expected = decoded_loss(model, batch) - trained
    (gap,) = gaps(tmp_path)
    assert abs(expected) > 1e-4
    assert gap == pytest.approx(expected, abs=1e-5)


def test_padding_is_no_part_of_the_gap():
    """Behind real tokens it changes nothing; a rank that has nothing else, its share being empty, finds no gap."""
    model = kvtrain.retrofit(make_host(layers=4), kvtrain.LCKV(kv_map=CYCLIC, forward_passes=1, prefill_block=3))
    ids, real = random_ids(2, 24), torch.zeros(2, 24, dtype=torch.bool)
    assert serving_gap(model, ids, real) == 0
    real[:, :17] = True
    cut = serving_gap(model, ids[:, :17], real[:, :17])
    assert abs(cut) > 1e-4
    torch.testing.assert_close(serving_gap(model, ids, real), cut, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kv_map", ["cla2", "yoco", "plain"])
def test_maps_that_read_from_below_have_no_gap(base, rows, tmp_path, kv_map):
    train(module_on(base, kv_map=kv_map), rows, tmp_path, 2, **LOOK)
    logged = {name for row in table(tmp_path / "metrics.csv") for name in row}
    assert "val_perplexity" in logged and "val_serving_gap" not in logged


class Watch(pl.Callback):
    """Losses, and the parameters that a step leaves alone."""

    def __init__(self):
        self.losses, self.idle = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for name, parameter in module.model.named_parameters():
            if parameter.grad is None or not parameter.grad.abs().max() > 0:
                self.idle.append((trainer.global_step, name))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["loss"].item())


@pytest.mark.parametrize(
    "settings",
    [
        {"forward_passes": 2},
        {"forward_passes": 2, "init": "mean", "mask_all_diagonals": True, "stale_target": True},
        {"kv_map": "pizza-bottom", "value_map": "first", "residual": True},
    ],
    ids=["cyclic", "stale", "fused"],
)
@pytest.mark.parametrize("distill", [True, False])
def test_every_parameter_learns(base, rows, tmp_path, settings, distill):
    """From the untouched base's distribution, or from the next token."""
    watch, training = Watch(), {"distill": distill, "activation_checkpointing": True}
    train(module_on(base, training=training, **settings), rows, tmp_path, 2, callbacks=[watch])
    assert len(watch.losses) == 2 and watch.idle == []


def test_distillation_brings_the_map_nearer_to_its_base(base, rows, tmp_path):
    watch, module = Watch(), module_on(base, steps=40, forward_passes=2, training={"distill": True})
    train(module, rows, tmp_path, 40, callbacks=[watch])
    assert sum(watch.losses[-10:]) < 0.7 * sum(watch.losses[:10])
    assert not [name for name in module.state_dict() if "teacher" in name]


def test_a_run_from_nothing_and_its_report(place, tmp_path, capsys):
    (tmp_path / "host.json").write_text(json.dumps(HOST | {"num_hidden_layers": 4}))
    content = yaml.safe_load(recipe_text(place, tmp_path / "run"))
    content["model"]["class_path"] = "LCKVPretrainModule"
    content["model"]["init_args"] |= {"model_config": str(tmp_path / "host.json"), "method": {"kv_map": CYCLIC}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert fit(recipe) == 0
    held_out = [row for row in read_metrics(tmp_path / "run") if "val_loss" in row]
    assert held_out[-1]["val_loss"] < held_out[0]["val_loss"]
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 0
    written = {path.name for path in (tmp_path / "run" / "report").iterdir()}
    assert written == {"loss.png", "kv_map.png", "learning_rate.png", "speed.png", "report.html"}
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    gap = f"{held_out[-1]['val_serving_gap']:+.5f}"
    assert f"<th>Held-out loss, serving minus training form</th><td>{gap}</td>" in page


@pytest.mark.parametrize(
    "settings",
    [{"stale_target": True, "mask_all_diagonals": True}, {"forward_passes": 0}],
    ids=["the owner", "its readers"],
)
def test_passes_in_which_weights_never_learn_are_refused(base, rows, tmp_path, settings):
    with pytest.raises(ValueError, match="no gradient here; set backward_passes to 2"):
        train(module_on(base, backward_passes=1, **settings), rows, tmp_path, 1)
    train(module_on(base, kv_map="cla2", backward_passes=1, **settings), rows, tmp_path / "below", 1)
