"""Exports of checkpoints in pieces: the folder that one file gives, in little memory."""

import filecmp
import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvtrain
from kvtrain.export import weights
from kvtrain.export.hf import export_run
from kvtrain.models.config import CHECKPOINT_KEY
from kvtrain.training.strategies import DEEPSPEED_INSTALLED
from tests.host_memory import peak_above_start
from tests.hosts import make_host
from tests.sharded_checkpoints import write_sharded, write_zero

PIECES = ["torch", *([2, 3] if DEEPSPEED_INSTALLED else [])]
MIB = 1 << 20


def write_run(run, form, model):
    """A run folder whose only checkpoint has a form."""
    settings = {"config": json.loads(model.config.to_json_string(use_diff=False)), "tokenizer": None}
    rest, checkpoint = {CHECKPOINT_KEY: json.dumps(settings)}, run / "checkpoints" / "step-000001.ckpt"
    state = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}  # ties once
    if form == "torch":
        write_sharded(checkpoint, state, **rest)
    elif form in (2, 3):
        write_zero(checkpoint, state, form, ranks=3, **rest)
    else:
        checkpoint.parent.mkdir(parents=True)
        torch.save({"state_dict": {f"model.{n}": t for n, t in model.state_dict().items()}, **rest}, checkpoint)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", PIECES)
def test_the_folder_is_the_one_of_a_single_file(tmp_path, form, tied, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", "20KB")  # several files, and an index
    model = kvtrain.retrofit(make_host("qwen3", dtype=torch.float32, tie_word_embeddings=tied), kvtrain.DMC())
    folders = []
    for kind in ("file", form):
        write_run(tmp_path / "run", kind, model)
        folders.append(export_run(tmp_path / "run", tmp_path / f"out {kind}"))
        shutil.rmtree(tmp_path / "run")
    compared = filecmp.dircmp(*folders)
    assert len(compared.common_files) > 5
    assert compared.left_only == compared.right_only == compared.diff_files == []


@pytest.mark.parametrize("form", PIECES)
def test_a_file_and_few_tensors_are_in_memory_at_most(tmp_path, form, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", "16MB")
    sizes = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6}
    host = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, **sizes))
    model = kvtrain.retrofit(host, kvtrain.DMC())
    write_run(tmp_path / "run", form, model)
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    largest = max(parameter.numel() for parameter in model.parameters()) * 4
    del host, model
    export_run(tmp_path / "run", tmp_path / "first")  # what is imported by now costs nothing
    peak, _ = peak_above_start(lambda: export_run(tmp_path / "run", tmp_path / "out", dtype="float32"))
    copies = 3 if form == "torch" else 2  # torch reads a rank's part twice over, and one rank's part is all here
    bound = copies * largest + 16 * MIB
    assert bound < 0.7 * whole
    assert peak < bound + 12 * MIB, f"{peak / MIB:.1f} MiB of {whole / MIB:.1f}"
