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
from kvtrain.models.duo.convert import gated_attention
from kvtrain.training.strategies import DEEPSPEED_INSTALLED
from tests.host_memory import peak_above_start
from tests.hosts import make_host
from tests.processes import PATIENCE, SERVER
from tests.sharded_checkpoints import write_sharded, write_zero

PIECES = ["torch", *([2, 3] if DEEPSPEED_INSTALLED else [])]
MIB = 1 << 20


def write_run(run, form, model, base=None):
    """A run folder whose only checkpoint has a form, and of a model on a base what was learnt alone."""
    settings = {"config": json.loads(model.config.to_json_string(use_diff=False)), "tokenizer": None}
    settings |= {} if base is None else {"base": str(base)}
    rest, checkpoint = {CHECKPOINT_KEY: json.dumps(settings)}, run / "checkpoints" / "step-000001.ckpt"
    learnt = [(n, p.detach()) for n, p in model.named_parameters() if base is None or n.endswith("gates")]  # ties once
    state = {f"model.{name}": tensor for name, tensor in learnt}
    if form == "torch":
        write_sharded(checkpoint, state, **rest)
    elif form in (2, 3):
        write_zero(checkpoint, state, form, ranks=3, **rest)
    else:
        checkpoint.parent.mkdir(parents=True)
        every = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}  # ties twice
        torch.save({"state_dict": state if base else every, **rest}, checkpoint)


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


def gated(host):
    """Every other head of a layer is open."""
    model = kvtrain.retrofit(host, kvtrain.Duo())
    for attention in gated_attention(model):
        attention.gates.data = torch.arange(attention.gates.numel()).remainder(2).float()
    return model


@pytest.mark.parametrize("form", ["file", *PIECES])
def test_what_is_sorted_as_it_is_read_is_what_a_model_sorts(tmp_path, form):
    host = make_host("qwen3", dtype=torch.float32, tie_word_embeddings=True)
    host.generation_config.max_length = 77
    host.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = gated(host)
    write_run(tmp_path / "whole", form, model)
    write_run(tmp_path / "gates", form, model, base=tmp_path / "base")
    model.binarize()
    for run in ("whole", "gates"):
        opened = kvtrain.load(str(export_run(tmp_path / run, tmp_path / f"{run} out", dtype="float32")))
        assert opened.method == model.method and len(model.method.full_heads[0]) == 1
        for name, tensor in model.state_dict().items():
            assert torch.equal(opened.state_dict()[name], tensor), name
    assert opened.generation_config.max_length == 77


def _export(folder, answers):
    weights.MAX_SHARD_SIZE = "16MB"
    export_run(folder / "run", folder / "first")  # what is imported by now costs nothing
    answers.put(peak_above_start(lambda: export_run(folder / "run", folder / "out", dtype="float32"))[0])


def peak_of_exporting(folder):
    """Bytes at most, in a process whose memory no other test has had."""
    answers = SERVER.Queue()
    process = SERVER.Process(target=_export, args=(folder, answers))
    process.start()
    peak = answers.get(timeout=PATIENCE)
    process.join()
    return peak


CASES = [(form, "dmc") for form in PIECES] + [(PIECES[0], "duo"), (PIECES[-1], "duo on its base")]


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_a_file_and_two_tensors_are_in_memory_at_most(tmp_path, form, kind):
    sizes = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6}
    host = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, **sizes))
    base = tmp_path / "base" if kind == "duo on its base" else None
    if base:
        host.save_pretrained(base)
    model = kvtrain.retrofit(host, kvtrain.DMC()) if kind == "dmc" else gated(host)
    write_run(tmp_path / "run", form, model, base)
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    largest = max(parameter.numel() for parameter in model.parameters()) * 4
    del host, model
    peak = peak_of_exporting(tmp_path)
    bound = 2 * largest + 16 * MIB
    assert bound < 0.6 * whole
    assert peak < bound, f"{peak / MIB:.1f} MiB of {whole / MIB:.1f}"
