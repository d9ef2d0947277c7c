"""The whole road in processes of its own: fit, SIGKILL, resume to the same bits, export, open elsewhere, generate."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import kvtrain
from kvtrain import run_folder
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.metrics import read_metrics
from tests.hosts import make_host
from tests.processes import KVTRAIN, Forked, Fresh, kill_when, run
from tests.training.small_runs import write_place


@dataclass(frozen=True)
class Road:
    """How one architecture trains, is killed and goes on.

    Attributes:
        recipe: Under ``recipes/tiny``.
        phases: Their steps, by name. Checkpoints come every third step, so that one lies exactly on a boundary.
        kills: After these steps the run is killed.
        layers: Of the host.
        settings: Of the method, or of a model that has no host.
        data: Of the data, beyond what all roads share.
        opens: Class of the exported model; one that is no host's starts from nothing.
    """

    recipe: str
    phases: dict[str, int]
    kills: tuple[int, ...]
    layers: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    opens: str = "KVLlamaForCausalLM"

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(self.phases.values())


# Columns of the metrics that time has no part in.
COMPARED = {"loss", "match", "gradient_norm", "mean_gate", "val_loss", "val_compression", "val_serving_gap"}

# One line an architecture, and one for adapters.
ROADS = {
    "dmc": Road("dmc", {"zero_out": 6, "retrofit": 8, "finetune": 6}, (6, 12), settings={"init_bias": 2.0}),
    "lora": Road("lora_dmc", {"zero_out": 6, "retrofit": 8, "finetune": 6}, (6, 12), settings={"init_bias": 2.0}),
    "dms": Road("dms", {"retrofit": 8, "finetune": 6}, (6, 9), settings={"init_bias": 1.0, "window": 5}),
    "lckv": Road("lckv", {"train": 3, "settle": 7}, (3,), 4, {"kv_map": "0_2_2_3", "forward_passes": 2}),
    "hybrid": Road("hybrid", {"match": 6, "distill": 6}, (3,), settings={"linear_layers": [0]}),
    "duo": Road(
        "duo",
        {"gates": 8},
        (3,),
        settings={"sink": 2, "recent": 8},
        data={"task": {"passkeys": 1, "words": 2}, "shortest": 112, "sequence_length": 128},
    ),
    "transnormer": Road(
        "transnormer_t1",
        {"pretrain": 8},
        (3,),
        settings={"hidden_size": 32, "num_hidden_layers": 3, "hidden_dropout": 0.1, "block_size": 16},
        opens="TransNormerForCausalLM",
    ),
}


OPEN = """
import json, sys, torch, kvtrain
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
out = model.generate(torch.arange(5, 45)[None], max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
print(json.dumps([type(model).__name__, out.sequences[0].tolist(), out.past_key_values.kv_bytes()]))
"""


def save_base(road, folder):
    host = make_host("llama", dtype=torch.float32, layers=road.layers, vocab_size=4096, tie_word_embeddings=True)
    host.save_pretrained(folder)
    load_tokenizer("kvtrain:tiny").save_pretrained(folder)
    write_place(folder)


def fit_arguments(road, base, folder, resume=False):
    curve = {"learning_rate": 1e-3, "final_learning_rate": 1e-4, "initial_learning_rate": 0, "decay_steps": None}
    phases = [{"name": name, "steps": steps, "warmup_steps": 0, **curve} for name, steps in road.phases.items()]
    settings = {
        "trainer.default_root_dir": folder,
        "trainer.max_steps": road.steps,
        "trainer.checkpoint_every": 3,
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": 10,
        "trainer.accumulate_grad_batches": 2,
        "trainer.num_threads": 1,
        "model.init_args.phases": json.dumps(phases),
        "data.corpus": base / "train.jsonl",
        "data.validation_corpus": base / "held.jsonl",
        "data.cache_dir": base / "cache",
        "data.sequence_length": 64,
        "data.batch_size": 2,
        "data.validation_rows": 2,
    }
    part = "method" if road.opens.startswith("KV") else "config"
    if part == "method":
        settings["model.init_args.base"] = base
    settings |= {f"model.init_args.{part}.{name}": value for name, value in road.settings.items()}
    settings |= {f"data.init_args.{name}": value for name, value in road.data.items()}
    if road.data:  # of another class, whose tokenizer is another model's
        settings["data.init_args.tokenizer"] = base
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    resuming = ["--ckpt_path", "last"] if resume else []
    return [str(word) for word in ("fit", "--config", f"recipes/tiny/{road.recipe}.yaml", *options, *resuming)]


def weights(folder, steps):
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps
    return checkpoint["state_dict"]


def has_saved(folder, step):
    """Whether a checkpoint of at least so many steps exists."""
    return any(run_folder.step_of(path) >= step for path in folder.glob("checkpoints/step-*.ckpt"))


def assert_same_run(road, resumed, whole):
    """The same bits in the weights and in all metrics that time has no part in."""
    expected, found = weights(whole, road.steps), weights(resumed, road.steps)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    rows = [{int(row["step"]): row for row in read_metrics(path)} for path in (whole, resumed)]
    assert list(rows[0]) == list(rows[1]) == list(range(road.steps))
    for step, row in rows[1].items():
        for name in COMPARED & row.keys():
            assert row[name] == rows[0][step][name], (step, name)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        *((name, Forked) for name in ROADS if name not in ("dms", "hybrid")),
        pytest.param("dms", Forked, marks=pytest.mark.roads),  # a base that stays, and a ramp: duo's and dmc's
        pytest.param("hybrid", Forked, marks=pytest.mark.roads),  # resumed in tests/training/test_hybrid_module.py
        pytest.param("dmc", Fresh, marks=[pytest.mark.roads, pytest.mark.timeout(900)]),
    ],
)
def test_the_road(name, start, tmp_path):
    road, base, whole, killed = ROADS[name], *(tmp_path / folder for folder in ("base", "whole", "killed"))
    log = tmp_path / "log"
    save_base(road, base)
    run(start, KVTRAIN, fit_arguments(road, base, whole), log)
    for number, step in enumerate(road.kills):
        arguments = fit_arguments(road, base, killed, resume=number > 0)
        kill_when(lambda step=step: has_saved(killed, step), start, KVTRAIN, arguments, log)
        for checkpoint in run_folder.step_files(killed):  # what has its name is whole
            assert torch.load(checkpoint, weights_only=True)["global_step"] == run_folder.step_of(checkpoint)
    run(start, KVTRAIN, fit_arguments(road, base, killed, resume=True), log)
    assert_same_run(road, killed, whole)

    exported = str(tmp_path / "exported")
    run(start, KVTRAIN, ["export", str(killed), exported], log)
    name, sequence, kv_bytes = json.loads(run(start, OPEN, [exported], log).splitlines()[-1])
    assert name == road.opens and len(sequence) == 48 and kv_bytes > 0
    again = kvtrain.load(exported).generate(torch.arange(5, 45)[None], max_new_tokens=8, do_sample=False)
    assert again[0].tolist() == sequence
