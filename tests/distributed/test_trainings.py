"""Every strategy on two processes ends where one process ends, goes on bit for bit, and is exported."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvtrain
from kvtrain.export.hf import export_run
from kvtrain.training.strategies import DEEPSPEED_INSTALLED
from tests.training.tiny_runs import table

from .launch import launch
from .trainings import BOUNDARY, TRAININGS, assert_equal, assert_same, train, write_place

STEPS = 8  # in the gating tier: over the first boundary, with held-out looks before and after it
ZERO = ("zero2", "zero3")
GATING = ("ddp", "fsdp2", *(ZERO if DEEPSPEED_INSTALLED else ()))
SHARING = "context"  # ranks share rows
EVERY = (*GATING, "hsdp", SHARING)
ADAPTERS = "dmc, adapters"
SHARDED = tuple(strategy for strategy in EVERY if strategy not in ("ddp", SHARING))

pytestmark = [pytest.mark.timeout(1500)]


def work(place: Path, jobs: dict[str, dict], world_size: int = 2) -> dict:
    return launch("tests.distributed.strategy_worker", world_size, place, json.dumps(jobs), DS_ACCELERATOR="cpu")


def whole_and_in_two(name: str, strategy: str, **settings: object) -> dict[str, dict]:
    """A run, and the same one stopped exactly at a phase boundary and continued."""
    job = {"name": name, "strategy": strategy, "steps": STEPS, **settings}
    begun, run = f"{name} {strategy} begun", f"{name} {strategy}"
    saved = f"{{place}}/{begun}/checkpoints/step-{BOUNDARY:06d}.ckpt"
    return {
        run: {**job, "run": run},
        begun: {**job, "steps": BOUNDARY, "run": begun},
        f"{run} resumed": {**job, "resume": saved, "run": f"{run} resumed"},
    }


def assert_exported(place: Path, run: str, weights: dict[str, torch.Tensor]) -> None:
    """The exported folder opens, and holds what was trained."""
    folder = export_run(place / run, place / f"{run} exported", dtype="float32")
    opened = kvtrain.load(str(folder))
    for name, weight in opened.named_parameters():
        assert torch.equal(weight, weights[f"model.{name}"]), name


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_place(folder)
    return folder


@pytest.fixture(scope="module")
def gating(place):
    """One launch: DMC under every strategy, and its run under FSDP2 once more in two parts; Duo on shared rows.

    Adapters and experts run under those that shard weights.
    A run goes on where ranks share rows, and another where they no longer do.
    """
    jobs = {f"dmc {strategy}": {"name": "dmc", "strategy": strategy, "steps": STEPS} for strategy in GATING}
    jobs |= whole_and_in_two("dmc", "fsdp2") | whole_and_in_two("dmc", SHARING)
    for ours, theirs in (("fsdp2", SHARING), (SHARING, "fsdp2")):
        going_on = jobs[f"dmc {ours} resumed"]
        jobs[f"dmc {ours} then {theirs}"] = {**going_on, "strategy": theirs, "run": f"{ours} then {theirs}"}
    jobs |= whole_and_in_two(ADAPTERS, "fsdp2")
    if "zero3" in GATING:
        jobs[f"{ADAPTERS} zero3"] = {"name": ADAPTERS, "strategy": "zero3", "steps": STEPS}
    for strategy in {"fsdp2", "zero3"} & {*GATING}:
        jobs[f"experts {strategy}"] = {"name": "experts", "strategy": strategy, "steps": STEPS}
    shared = {"strategy": SHARING, "steps": STEPS}
    jobs["merging"] = {"name": "dmc, merging", "run": "merging", **shared}
    return work(place, jobs | {f"duo {SHARING}": {"name": "duo", **shared}})


@pytest.mark.roads
@pytest.mark.parametrize("name", ["dmc", ADAPTERS, "duo", "experts"])
def test_two_processes_end_as_one(place, gating, name, subtests):
    alone = train(name, place, steps=STEPS)
    runs = [run for run in gating if run.rpartition(" ")[0] == name and run.rpartition(" ")[2] in EVERY]
    sharded = len({"fsdp2", "zero3"} & {*GATING})
    assert len(runs) == {"dmc": len(GATING) + 1, ADAPTERS: sharded, "duo": 1, "experts": sharded}[name]
    for run in runs:
        with subtests.test(run):
            assert_same(gating[run], alone)


@pytest.mark.roads
@pytest.mark.parametrize("run", ["dmc fsdp2", f"dmc {SHARING}", f"{ADAPTERS} fsdp2"])
def test_a_sharded_run_goes_on_bit_for_bit_at_a_boundary(gating, run):
    assert_equal(gating[f"{run} resumed"]["weights"], gating[run]["weights"])


@pytest.mark.roads
@pytest.mark.parametrize(("run", "whole"), [("fsdp2 then context", "fsdp2"), ("context then fsdp2", SHARING)])
def test_a_run_goes_on_on_rows_shared_otherwise(gating, run, whole):
    told = {"losses": [], "norms": [], "held_out": []}
    assert_same({**gating[f"dmc {run}"], **told}, {**gating[f"dmc {whole}"], **told}, tolerance=1e-6)


@pytest.mark.roads
def test_heads_are_counted_once_on_shared_rows(place, gating):
    assert_same(gating["merging"], train("dmc, merging", place, steps=STEPS, run="alone"))
    ours, theirs = (table(place / run / "head_compression.csv") for run in ("merging", "alone"))
    assert {row["head"] for row in theirs} == {0, 1}
    assert all(0.2 < row["merged_fraction"] < 0.8 for row in theirs)
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)


@pytest.mark.roads
def test_a_sharded_run_is_exported(place, gating):
    assert_exported(place, "dmc fsdp2", gating["dmc fsdp2"]["weights"])


@pytest.mark.roads
def test_a_sharded_run_of_adapters_keeps_little_and_is_merged(place, gating):
    """Its checkpoint holds what trains alone; the folder has every weight of the base, the adapted ones moved."""
    run = f"{ADAPTERS} fsdp2"
    folder = export_run(place / run, place / f"{run} exported", dtype="float32")
    base = kvtrain.load(str(place / ADAPTERS), dtype=torch.float32).state_dict()
    merged = kvtrain.load(str(folder)).state_dict()
    moved = {name for name, weight in base.items() if not torch.equal(merged[name], weight)}
    assert merged.keys() == base.keys() and moved == {name for name in base if "_proj." in name and "weight" in name}
    before = gating[run]["weights"]
    for name in moved:
        layer = f"model.{name.removesuffix('.weight')}"
        inner = layer if f"{layer}.base_layer.weight" in before else f"{layer}.inner"
        product = before[f"{inner}.lora_B.default.weight"] @ before[f"{inner}.lora_A.default.weight"]
        expected = base[name] + 2.0 * product
        for row in torch.nonzero((merged[name] - expected).abs().amax(1) > 1e-6).flatten():
            separate = before[f"{layer}.own_rows.weight"]
            assert (separate == merged[name][row]).all(1).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TRAININGS))
def test_every_training_ends_as_in_one_process(place, name):
    jobs = {strategy: {"name": name, "strategy": strategy, "window": 4} for strategy in EVERY}
    found, expected = work(place, jobs), train(name, place, window=4)
    if words := TRAININGS[name].needs_whole_rows:
        assert words in found.pop(SHARING)
    for strategy in found:
        assert_same(found[strategy], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "groups"), [("hsdp", 2), (SHARING, 2), ("hsdp, context", 3)])
def test_four_processes_in_groups(place, strategy, groups):
    """Two copies of two shards; four shards of which two share rows; two copies whose two shards share rows."""
    found = work(place, {"run": {"name": "dmc", "strategy": strategy, "timeout_minutes": 7}}, world_size=4)["run"]
    assert found["waits"] == [7] * groups
    assert_same(found, train("dmc", place))


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, 0.01])
def test_one_step_moves_weights_as_far(place, clip):
    """Under SGD, unclipped and clipped to less than the gradient's norm."""
    jobs = {s: {"name": "sgd", "strategy": s, "steps": 1, "gradient_clip_val": clip} for s in EVERY}
    found, expected = work(place, jobs), train("sgd", place, steps=1, gradient_clip_val=clip)
    assert expected["norms"][0] > 0.1
    for strategy in EVERY:
        assert_same(found[strategy], expected, tolerance=1e-7)


@pytest.mark.slow
def test_half_precision_has_float32_masters(place):
    jobs = {
        precision: {"name": "dmc", "strategy": "fsdp2", "precision": precision}
        for precision in ("32-true", "bf16-mixed")
    }
    found = work(place, jobs)
    half, exact = found["bf16-mixed"], found["32-true"]
    assert {weight.dtype for weight in half["weights"].values()} == {torch.float32}
    torch.testing.assert_close(half["held_out"], exact["held_out"], atol=5e-3, rtol=0)
    assert half["held_out"] != exact["held_out"]


@pytest.fixture(scope="module")
def in_two(place):
    """Of a run that trains everything, and one that trains gates alone, under every strategy that shards."""
    jobs = [whole_and_in_two(name, strategy) for name, strategy in itertools.product(("dmc", "duo"), SHARDED)]
    return work(place, {job: arguments for part in jobs for job, arguments in part.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmc", "duo"])
@pytest.mark.parametrize("strategy", SHARDED)
def test_a_run_goes_on_bit_for_bit(in_two, name, strategy):
    run = f"{name} {strategy}"
    assert_equal(in_two[f"{run} resumed"]["weights"], in_two[run]["weights"])


@pytest.mark.slow
def test_a_run_in_half_precision_goes_on_bit_for_bit(tmp_path):
    write_place(tmp_path)
    strategies = [strategy for strategy in GATING if strategy != "ddp"]
    jobs = [whole_and_in_two("dmc", strategy, precision="bf16-mixed") for strategy in strategies]
    found = work(tmp_path, {job: arguments for part in jobs for job, arguments in part.items()})
    for strategy in strategies:
        whole, resumed = found[f"dmc {strategy}"], found[f"dmc {strategy} resumed"]
        assert_equal(resumed["weights"], whole["weights"])
        for figures in ("losses", "norms"):
            assert resumed[figures] == whole[figures][BOUNDARY:]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SHARDED)
def test_a_run_is_exported(place, in_two, strategy):
    assert_exported(place, f"dmc {strategy}", in_two[f"dmc {strategy}"]["weights"])
    folder = export_run(place / f"duo {strategy}", place / f"duo {strategy} exported")
    rounded = AutoModelForCausalLM.from_pretrained(folder).method.full_heads
    assert sum(map(len, rounded)) == 3  # of six heads, by the default sparsity


@pytest.mark.slow
def test_on_another_number_of_processes(place, in_two):
    """A run under FSDP2 goes on as before; one under ZeRO says what to do."""
    jobs = {
        strategy: {**whole_and_in_two("dmc", strategy)[f"dmc {strategy} resumed"], "run": f"{strategy} alone"}
        for strategy in ("fsdp2", *ZERO)
    }
    alone = work(place, jobs, world_size=1)
    assert_same(
        {**alone["fsdp2"], "losses": [], "norms": [], "held_out": []},
        {**in_two["dmc fsdp2"], "losses": [], "norms": [], "held_out": []},
        tolerance=1e-6,
    )
    for strategy in ZERO:
        assert "written by 2 ranks, and here are 1" in alone[strategy]


@pytest.mark.slow
def test_what_another_strategy_wrote_is_refused(place, in_two):
    def resumed(strategy: str, written: str) -> dict:
        return {**whole_and_in_two("dmc", written)[f"dmc {written} resumed"], "strategy": strategy, "run": "refused"}

    pairs = [("fsdp2", "zero2"), ("zero2", "fsdp2"), ("zero2", "zero3")]
    refused = work(place, {f"{a} {b}": resumed(a, b) for a, b in pairs})
    assert "not written under fsdp2" in refused["fsdp2 zero2"]
    assert "not written by DeepSpeed" in refused["zero2 fsdp2"]
    assert "written under ZeRO-3, not 2" in refused["zero2 zero3"]


class Bomb:
    """Opens a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ZERO)
def test_a_planted_class_is_refused_and_not_run(place, in_two, strategy, tmp_path):
    job = whole_and_in_two("dmc", strategy)[f"dmc {strategy} resumed"]
    saved = Path(job["resume"].format(place=place))
    copy = place / f"{strategy} planted.ckpt"
    shutil.copytree(saved, copy)
    for shard in copy.rglob("*optim_states.pt"):
        state = torch.load(shard, weights_only=False)
        torch.save({**state, "bomb": Bomb(tmp_path / "exploded")}, shard)
    refused = work(place, {"job": {**job, "resume": str(copy), "run": "planted"}})
    assert "which no checkpoint of kvtrain needs" in refused["job"] and "\n" not in refused["job"]
    assert not (tmp_path / "exploded").exists()
