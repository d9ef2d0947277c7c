"""``kvtrain check``: verdicts by value, and processes that meet, share a folder, or do not."""

import json
import os
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvtrain.errors import UsageError
from kvtrain.training.cli import read_recipe
from kvtrain.training.estimate import estimate_recipe
from kvtrain.training.preflight import facts as facts_module
from kvtrain.training.preflight import verdicts
from kvtrain.training.preflight.check import asked_of
from kvtrain.training.preflight.facts import AllReduce, Facts, Folder, gather_facts, time_all_reduce, try_folder
from kvtrain.training.preflight.meeting import Meeting
from kvtrain.training.preflight.network import interfaces, own_address
from kvtrain.training.preflight.verdicts import Asked
from kvtrain.training.preflight.world import World, find_world
from kvtrain.training.trainer import KVTrainer
from kvtrain_cli import main
from tests.training.small_runs import fit, recipe_text, write_place

GIB = 1 << 30
TORCHRUN = World(0, 4, 0, 0, "torchrun")


def rank(number, node=0, **others):
    usual = {"host": f"h{node}", "address": f"10.0.0.{node + 1}", "interface": "eth0", "route": "eth0"}
    rest = {"device": "cpu (2 cores)", "memory": 8 * GIB, "run": "/runs/a", "versions": {"torch": "2.13.0"}}
    return Facts(number, node, **{**usual, **rest, **others})


def asked(nodes=2, devices=2, backend="gloo"):
    return Asked(nodes, devices, backend, Path("/runs/a"))


FOUR = [rank(0), rank(1), rank(2, 1), rank(3, 1)]


def test_ranks_are_held_against_the_recipe():
    assert verdicts.processes(asked(), TORCHRUN, FOUR).remedy == ""
    wrong = verdicts.processes(asked(1, 1), World(0, 2, 0, 0, "torchrun"), FOUR[:2])
    assert wrong.found == "2 on 1 node, by torchrun; the recipe has 1 node of 1 device"
    assert wrong.remedy == "start 1 process on 1 node, or give --trainer.num_nodes 1 --trainer.devices 2"
    # As many ranks, on other nodes than the recipe says.
    assert verdicts.processes(asked(1, 4), TORCHRUN, FOUR).remedy.startswith("start 4 processes on 1 node, or give")
    alone = verdicts.processes(asked(1, 8), World(), FOUR[:1])
    assert "fit starts the others itself" in alone.found and not alone.remedy
    assert "kvtrain recipes --launchers" in verdicts.processes(asked(2, 8), World(), FOUR[:1]).remedy


def test_a_node_has_a_line_with_ranks_and_devices():
    first, second = verdicts.nodes([*FOUR[:2], rank(2, 1), rank(3, 1, device="")])
    assert first == ("node 0", "ranks 0-1 on h0 at 10.0.0.1 (eth0), cpu (2 cores)", "")
    assert second.subject == "node 1" and second.remedy.startswith("no GPU for rank 3: start as many processes")


def test_an_address_that_leads_back_is_no_address_for_others():
    assert verdicts.addresses(asked(), FOUR) is None
    home = {"address": "127.0.0.1", "interface": "lo"}
    assert verdicts.addresses(asked(), [rank(0, **home), rank(1, **home)]) is None  # one node: nobody else looks
    lost = verdicts.addresses(asked(), [rank(0, **home, route="va"), rank(1, 1, **home, route="vb")])
    assert lost.found == "ranks 0-1 of several nodes would be looked for at 127.0.0.1"
    assert lost.remedy.startswith("export GLOO_SOCKET_IFNAME on each node: va on node 0, vb on node 1")
    same = verdicts.addresses(asked(backend="nccl"), [rank(0), rank(1, 1, **home)])
    assert same.remedy.startswith("export NCCL_SOCKET_IFNAME=eth0 on all nodes")


def test_the_speed_of_a_sum_is_what_a_rank_sends():
    line = verdicts.all_reduce(AllReduce(0.002, 1 << 20, 0.5), 4, gradients=3 << 20)
    assert line.found == "2.00 ms at least; 1.0 MiB in 500.0 ms, 3.0 MiB/s a rank; a step's gradients: 1.5 s"
    failed = verdicts.all_reduce(AllReduce(error="connection refused"), 4, 0)
    assert "connection refused" in failed.found and "NCCL_SOCKET_IFNAME" in failed.remedy


def test_a_folder_that_some_do_not_see_is_named_with_their_ranks():
    assert verdicts.run_folder(Folder([], "", GIB), FOUR).remedy == ""
    ranks = [*FOUR[:2], rank(2, 1, run="/elsewhere/a"), rank(3, 1, run="/elsewhere/a")]
    apart = verdicts.run_folder(Folder([2, 3], "", GIB), ranks)
    assert apart.found.startswith("/runs/a: ranks 2-3 do not see") and "/elsewhere/a" in apart.found
    assert "a file system that all nodes mount" in apart.remedy
    assert verdicts.run_folder(Folder([], "/runs: Permission denied", 0), FOUR).found == "/runs: Permission denied"


def test_two_checkpoints_must_fit():
    assert verdicts.disk(2 * GIB, GIB).remedy == ""
    short = verdicts.disk(2 * GIB - 1, GIB)
    assert short.remedy.startswith("make room for 2.0 GiB at least")


def test_a_rank_s_share_of_main_memory_and_a_whole_gpu(tmp_path):
    write_place(tmp_path)
    (tmp_path / "r.yaml").write_text(recipe_text(tmp_path, tmp_path / "run"))
    figures = estimate_recipe(*read_recipe(["--config", str(tmp_path / "r.yaml")]))
    peak = figures.peak_bytes
    two = [rank(0, memory=2 * peak), rank(1, memory=2 * peak)]
    assert verdicts.memory(figures, two, asked()).remedy == ""
    less = [rank(0, memory=2 * peak), rank(1, memory=2 * peak - 2)]
    assert "lower --data.batch_size" in verdicts.memory(figures, less, asked()).remedy
    assert verdicts.memory(figures, less, asked(backend="nccl")).remedy == ""
    alone = [rank(0, memory=2 * peak)]  # fit will start three more
    assert verdicts.memory(figures, alone, asked(1, 4)).remedy != ""


def test_versions_are_held_against_the_first_rank_s():
    assert verdicts.versions(FOUR).found == "torch 2.13.0"
    odd = verdicts.versions([*FOUR[:3], rank(3, 1, versions={"torch": "2.11.0"})])
    assert odd.found == "rank 0 has torch 2.13.0, rank 3 2.11.0" and odd.remedy


def test_runs_of_ranks_are_put_together():
    assert verdicts._ranks([3, 0, 1, 7, 6]) == "ranks 0-1, 3, 6-7"
    assert verdicts._ranks([5]) == "rank 5"


@pytest.mark.parametrize(
    ("devices", "number"), [(8, 8), ("8", 8), ([0, 3], 2), ("0,3", 2), ("auto", 1), (-1, 1), (None, 1)]
)
def test_devices_are_counted(devices, number):
    trainer = {"accelerator": "cpu", "devices": devices, "num_nodes": 3, "default_root_dir": "runs/x"}
    assert asked_of(trainer) == (3, number, "gloo", Path("runs/x"))


def test_launchers_are_told_apart():
    shared = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert find_world({}) == World()
    assert find_world({**shared, "CROSS_RANK": "1"}) == World(3, 4, 1, 1, "deepspeed")
    assert find_world({**shared, "NODE_RANK": "1"}) == World(3, 4, 1, 1, "the environment")


def test_torchrun_and_slurm_are_found_as_lightning_finds_them(monkeypatch):
    shared = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in {**shared, "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert find_world() == World(3, 4, 1, 1, "torchrun")
    for name in (*shared, "TORCHELASTIC_RUN_ID", "GROUP_RANK"):
        monkeypatch.delenv(name)
    slurm = {"NTASKS": "4", "PROCID": "2", "LOCALID": "0", "NODEID": "1", "JOB_ID": "17", "NODELIST": "n[3-4]"}
    for name, value in {**slurm, "JOB_NAME": "kvtrain"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(sys, "argv", ["kvtrain"])
    with pytest.raises(UsageError, match="Use `--ntasks-per-node=4` instead"):
        find_world()
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert find_world() == World(2, 4, 0, 1, "SLURM")
    assert os.environ["MASTER_ADDR"] == "n3" and os.environ["MASTER_PORT"].isdecimal()
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.delenv("MASTER_PORT")


def test_gloo_is_asked_by_its_own_variable(monkeypatch):
    if "lo" not in interfaces():
        pytest.skip("needs Linux' interfaces")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth0")
    assert own_address("gloo")[:2] == ("127.0.0.1", "lo")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert own_address("gloo").route == "lo"


@pytest.fixture
def place_to_meet(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def in_threads(act, size=2, timeout=20):
    """What ``act(meeting)`` returns on each of several ranks."""

    def enter(number):
        meeting = Meeting(World(number, size, number, 0, "threads"), timeout)
        try:
            return act(meeting)
        finally:
            meeting.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(enter, range(size)))


def test_ranks_exchange_values(place_to_meet):
    def act(meeting):
        return [meeting.share("a", {"me": meeting.world.rank}), meeting.share("b", meeting.world.rank * 10)]

    assert in_threads(act, 3) == [[[{"me": 0}, {"me": 1}, {"me": 2}], [0, 10, 20]]] * 3
    assert Meeting(World(), 1).share("a", 5) == [5]


def test_a_rank_that_does_not_come_is_missed(place_to_meet):
    with pytest.raises(UsageError, match=r"rank 0 of 2 on \S+ has not met all others at 127.0.0.1:\d+ within 1 s"):
        Meeting(World(0, 2, 0, 0, "threads"), 1)


def test_a_shared_folder_is_found_to_be_one_and_left_clean(place_to_meet, tmp_path, monkeypatch):
    monkeypatch.setattr(facts_module, "_LOOKS", 2)
    run = tmp_path / "runs" / "a"
    outcomes = in_threads(lambda meeting: try_folder(meeting, run))
    assert [(folder.apart, folder.error, folder.free > 0) for folder in outcomes] == [([], "", True)] * 2
    assert list(tmp_path.iterdir()) == []


def test_folders_of_the_same_name_on_two_machines_are_two(place_to_meet, tmp_path, monkeypatch):
    monkeypatch.setattr(facts_module, "_LOOKS", 2)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "kept").write_text("")
    outcomes = in_threads(lambda meeting: try_folder(meeting, tmp_path / str(meeting.world.rank)))
    assert [folder.apart for folder in outcomes] == [[1], [1]]
    assert [path.name for path in tmp_path.rglob("*")] == ["0", "kept"]


def test_a_folder_that_cannot_be_made_is_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert try_folder(Meeting(World(), 1), tmp_path / "file" / "run") == (
        [],
        f"{tmp_path}/file/run: Not a directory",
        0,
    )


def test_a_sum_over_one_rank_is_timed(place_to_meet, monkeypatch):
    meeting = Meeting(World(), 1)
    meeting.store = facts_module.torch.distributed.HashStore()
    measured = time_all_reduce(meeting, "gloo")
    assert measured.error == "" and measured.size == 16 << 20 and measured.seconds > 0
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    meeting.store = facts_module.torch.distributed.HashStore()
    assert "nosuch0" in time_all_reduce(meeting, "gloo").error


def test_facts_of_this_process():
    mine = gather_facts(World(), Path("runs/x"), "gloo")
    assert (mine.rank, mine.node, mine.run) == (0, 0, str(Path.cwd() / "runs/x"))
    assert mine.memory > 1 << 28
    assert mine.versions["torch"] == facts_module.torch.__version__


@pytest.fixture
def recipe(tmp_path):
    write_place(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text(tmp_path, tmp_path / "runs" / "a"))
    return path


def test_a_recipe_is_checked_without_a_launcher(recipe, capsys):
    assert main(["check", "--config", str(recipe)]) == 0
    table, _, text = capsys.readouterr().out.partition("---")
    assert [line.split()[0] for line in table.splitlines() if line.strip()][2:] == [
        *("processes", "node", "run", "disk", "memory", "versions", "first", "micro-batch")
    ]
    assert text.startswith(" the first row, what is learned between ⟦ and ⟧ ---\n")
    assert not (recipe.parent / "runs").exists()
    code, findings = findings_of(capsys, str(recipe), "--trainer.num_nodes", "2")
    assert code == 2 and "kvtrain recipes --launchers" in findings["processes"]["remedy"]
    assert findings["disk"]["remedy"] == ""
    assert findings["micro-batch"]["found"] == "not tried: several processes train, and this is one"


def findings_of(capsys, *words):
    code = main(["check", "--json", "--config", *words])
    return code, {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_the_first_micro_batch_is_trained(recipe, capsys, monkeypatch):
    """What it holds and comes to; what cannot be read, or is too much, is told with a remedy."""
    code, findings = findings_of(capsys, str(recipe))
    assert code == 0 and findings["first batch"]["found"].startswith("2 x 32 tokens, ")
    assert re.match(r"loss [\d.]+ forward and backward in [\d.]+ s", findings["micro-batch"]["found"])
    code, findings = findings_of(capsys, str(recipe), "--no-step")
    assert code == 0 and "micro-batch" not in findings
    code, findings = findings_of(capsys, str(recipe), "--data.corpus", "/nothing.jsonl")
    assert code == 2 and findings["recipe"]["remedy"].startswith("/nothing.jsonl: no such file")
    assert "micro-batch" not in findings and findings["disk"]["remedy"] == ""

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nSee documentation")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 3 << 30))
    monkeypatch.setattr(KVTrainer, "fit", no_memory)
    code, findings = findings_of(capsys, str(recipe))
    assert code == 2 and findings["micro-batch"]["found"].startswith("out of memory (2.0 GiB taken): CUDA out of")
    assert "lower data.batch_size" in findings["micro-batch"]["remedy"]


def test_a_run_folder_in_a_file_s_way_is_no_traceback(recipe, capsys):
    assert main(["check", "--config", str(recipe), "--trainer.default_root_dir", f"{recipe}/x", "--json"]) == 2
    findings = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["run folder"]["found"] == f"{recipe}/x: Not a directory"


def test_a_checkpoint_is_as_large_as_foretold(recipe):
    run = recipe.parent / "runs" / "a"
    assert fit(recipe, "--trainer.limit_val_batches", "0", "--trainer.max_steps", "3") == 0
    foretold = estimate_recipe(*read_recipe(["--config", str(recipe)])).checkpoint_bytes
    assert foretold == pytest.approx((run / "checkpoints" / "last.ckpt").stat().st_size, rel=0.05)
