"""DMS's adapters learn what is needed: passkeys are found where as many slots drawn by lot lose them."""

import json

import pytest
import yaml

from kvtrain.cli import main

WINDOW, LENGTH = 16, 256
PASSKEYS = {"passkeys": 2, "words": 4}
RECIPE = {
    "seed_everything": 1,
    "trainer": {
        "max_steps": 60,
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "val_check_interval": 60,
        "check_val_every_n_epoch": None,
        "checkpoint_every": 60,
    },
    "model": {
        "class_path": "kvtrain.training.DMSModule",
        "init_args": {
            "base": "kvtrain:copy",
            "method": {"compression": 4.0, "window": WINDOW},
            "phases": [
                {"name": "retrofit", "steps": 40, "learning_rate": 1e-3},
                {"name": "finetune", "steps": 20, "learning_rate": 1e-3, "final_learning_rate": 0.0},
            ],
            "seed": 1,
        },
    },
    "data": {
        "class_path": "kvtrain.data.recall.RecallDataModule",
        "init_args": {
            "tokenizer": "kvtrain:copy",
            "corpus": "stdlib",
            "validation_corpus": "heldout",
            "validation_rows": 8,
            "task": PASSKEYS,
            "shortest": LENGTH,
            "sequence_length": LENGTH,
            "batch_size": 8,
            "seed": 2,
        },
    },
}


def found(model, measured, *options):
    """Share of the words that are found, and tokens for each that is kept."""
    asked = ["eval", str(model), "--tasks", "passkey", "--sequence-length", str(LENGTH), "--limit", "20", *options]
    counts = [word for name, count in PASSKEYS.items() for word in (f"--{name}", str(count))]
    assert main([*asked, *counts, "--json", str(measured)]) == 0
    (row,) = json.loads(measured.read_text())
    return row["token_accuracy"], row["compression"]


@pytest.mark.slow
def test_adapters_keep_what_is_asked_for(tmp_path):
    """T25: a gate that learnt nothing would lose what random eviction of as many slots loses."""
    recipe = {**RECIPE, "trainer": {**RECIPE["trainer"], "default_root_dir": str(tmp_path / "run")}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model"), "--dtype", "float32"]) == 0
    learnt, compression = found(tmp_path / "model", tmp_path / "learnt.json")
    plain, _ = found("kvtrain:copy", tmp_path / "plain.json")
    budget = round(LENGTH / compression)
    method = f"RandomEviction(budget={budget}, recent={WINDOW}, prompt='blocks')"
    random, as_far = found("kvtrain:copy", tmp_path / "random.json", "--method", method)
    assert compression > 3.0 and as_far < 1.05 * compression
    assert plain > 0.98 and learnt > 0.9 and random < 0.75, (plain, learnt, random)
