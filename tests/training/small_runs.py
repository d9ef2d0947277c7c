"""A recipe that trains in a fraction of a second, and what tests ask of its runs."""

import json
from pathlib import Path

import yaml

from kvtrain import run_folder
from kvtrain.cli import main

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12

# Set by the recipes of these tests; acts at the end of one micro-batch, two of which make a step.
CALLBACK = """
import os
import lightning.pytorch as pl

class Act(pl.Callback):
    def __init__(self, what: str, batch: int):
        self.what, self.batch = what, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            if self.what == "crash":
                raise RuntimeError("planted")
            os.kill(os.getpid(), int(self.what))
"""

HOST = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


def write_place(folder: Path) -> None:
    """Put a small corpus, a small host and the callback into a folder."""
    for name, count in (("train", 120), ("held", 12)):
        rows = [{"text": " ".join(str((row * 31 + word * word) % 97) for word in range(40))} for row in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "host.json").write_text(json.dumps(HOST))
    (folder / "planted_callback.py").write_text(CALLBACK)


def recipe_text(place: Path, run: Path, steps: int = STEPS) -> str:
    content = {
        "seed_everything": 1,
        "trainer": {
            "default_root_dir": str(run),
            "max_steps": steps,
            "accelerator": "cpu",
            "devices": 1,
            "accumulate_grad_batches": 2,
            "val_check_interval": 8,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "checkpoint_every": 3,
        },
        "model": {
            "class_path": "PretrainModule",
            "init_args": {
                "model_config": str(place / "host.json"),
                "phases": [
                    {"name": "first", "steps": 5, "learning_rate": 1e-2},
                    {"name": "second", "steps": steps - 5, "learning_rate": 1e-2, "final_learning_rate": 1e-3},
                ],
                "seed": 3,
            },
        },
        "data": {
            "corpus": str(place / "train.jsonl"),
            "validation_corpus": str(place / "held.jsonl"),
            "sequence_length": 32,
            "batch_size": 2,
            "seed": 5,
        },
    }
    return yaml.safe_dump(content, sort_keys=False)


def fit(recipe: Path, *options: str) -> int:
    return main(["fit", "--config", str(recipe), *options])


def acting(what: object, batch: int) -> list[str]:
    callback = {"class_path": "planted_callback.Act", "init_args": {"what": str(what), "batch": batch}}
    return ["--trainer.callbacks", json.dumps([callback])]


def refused(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out.strip() == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    return lines[0].removeprefix("kvtrain: error: ")


def steps_saved(run: Path) -> list[int]:
    return sorted(run_folder.step_of(path) for path in run_folder.step_files(run))
