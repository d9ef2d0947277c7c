"""What starts recipes on many machines: listed, copied, and what each script runs, by stand-ins for what it starts."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from kvtrain.cli import build_parser
from kvtrain.recipes import launchers_folder, list_launchers, shown
from kvtrain.training.cli import read_recipe
from kvtrain_cli import main

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / name for name in ("torchrun.sh", "deepspeed.sh", "slurm.sbatch")]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
# In the place of Python and of SLURM's command.
SAY = '#!/usr/bin/env bash\nprintf "%s\\n" "$(basename "$0")" "$@" >> "$SAID"\n'
SRUN = '#!/usr/bin/env bash\nprintf "%s\\n" srun "$1" >> "$SAID"\nshift\nexec "$@"\n'


@pytest.fixture
def run(tmp_path):
    """Runs a script with stand-ins; returns its exit code and the words that each of them was called with."""
    for name, text in (("python", SAY), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    inherited = {name: os.environ[name] for name in ("HOME",) if name in os.environ}

    def run(script, *words, **environment):
        said = tmp_path / "said"
        said.write_text("")
        place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(said), **inherited, **environment}
        done = subprocess.run(["bash", LAUNCH / script, *words], capture_output=True, text=True, check=False, env=place)
        return done.returncode, said.read_text().splitlines(), done.stderr

    return run


def test_launchers_are_listed_with_purpose_and_needs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list_launchers()
    assert [str(launcher.path.relative_to(LAUNCH)) for launcher in found] == [
        "deepspeed.sh",
        "kubernetes.yaml",
        "serve/kserve.yaml",
        "serve/kubernetes.yaml",
        "serve/ray.yaml",
        "slurm.sbatch",
        "torchrun.sh",
    ]
    assert all(launcher.purpose and launcher.needs for launcher in found)
    assert main(["recipes", "--launchers"]) == 0
    listed = capsys.readouterr().out
    assert all(shown(launcher.path) in listed for launcher in found)


def test_launchers_and_recipes_are_copied_once(capsys, tmp_path):
    assert main(["recipes", "--launchers", "--copy", str(tmp_path / "launch")]) == 0
    assert sorted(path.name for path in (tmp_path / "launch").iterdir()) == sorted(p.name for p in LAUNCH.iterdir())
    assert os.access(tmp_path / "launch" / "torchrun.sh", os.X_OK)
    assert main(["recipes", "--copy", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "tiny" / "dmc.yaml").read_bytes() == (ROOT / "recipes/tiny/dmc.yaml").read_bytes()
    capsys.readouterr()
    assert main(["recipes", "--copy", str(tmp_path / "mine")]) == 2
    assert capsys.readouterr().err == f"kvtrain: error: {tmp_path}/mine exists already; name a new folder\n"


def test_launchers_inside_a_wheel_are_found(monkeypatch, tmp_path):
    (tmp_path / "kvtrain" / "launch").mkdir(parents=True)
    monkeypatch.setattr("kvtrain.recipes._PACKAGE", tmp_path / "kvtrain")
    assert launchers_folder() == tmp_path / "kvtrain" / "launch"
    assert '"launch" = "kvtrain/launch"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_and_says_how_it_is_called(script, run):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    code, said, error = run(script.name)
    assert (code, said) == (2, [])
    assert error.startswith("usage: ") and script.name in error
    assert "set -euo pipefail" in script.read_text()


def test_torchrun_on_one_machine_takes_all_gpus_and_goes_on(run):
    code, said, _ = run("torchrun.sh", "fit", "--config", "r.yaml")
    expected = "python -m torch.distributed.run --standalone --nnodes 1 --nproc-per-node gpu --max-restarts 3"
    assert (code, said) == (0, f"{expected} -m kvtrain fit --ckpt_path last --config r.yaml".split())


def test_torchrun_on_several_machines_meets_at_the_head(run):
    from torch.distributed.run import get_args_parser

    place = {"HEAD": "node0", "NODES": "8", "DEVICES": "4", "NODE_RANK": "1", "NODE_ADDRESS": "10.0.0.2", "JOB": "j"}
    code, said, _ = run("torchrun.sh", "fit", "--config", "r.yaml", RESTARTS="5", **place)
    assert code == 0
    asked = get_args_parser().parse_args(said[3:])  # refuses options that this torch does not know
    assert (asked.nnodes, asked.nproc_per_node, asked.max_restarts) == ("8", "4", 5)
    assert (asked.rdzv_backend, asked.rdzv_endpoint, asked.rdzv_id) == ("c10d", "node0:29500", "j")
    assert (asked.rdzv_conf, asked.local_addr) == ("is_host=0", "10.0.0.2")
    assert (asked.training_script, asked.training_script_args) == (
        "kvtrain",
        ["fit", "--ckpt_path", "last", "--config", "r.yaml"],
    )
    _, said, _ = run("torchrun.sh", "fit", **{**place, "NODE_RANK": "0"})
    assert get_args_parser().parse_args(said[3:]).rdzv_conf == "is_host=1"
    code, said, error = run("torchrun.sh", "fit", NODES="2")
    assert (code, said) == (1, []) and "HEAD: the node where all meet" in error


def test_checks_are_run_once_and_have_no_checkpoint(run):
    _, said, _ = run("torchrun.sh", "check", "--config", "r.yaml")
    assert said[-7:] == ["--max-restarts", "0", "-m", "kvtrain", "check", "--config", "r.yaml"]


def test_deepspeed_reads_the_hostfile(run, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text((LAUNCH / "hostfile").read_text())
    code, said, _ = run("deepspeed.sh", "fit", "--config", "r.yaml", HOSTFILE=str(hostfile), HEAD="10.0.0.1")
    where = f"--hostfile {hostfile} --master_addr 10.0.0.1 --no_ssh_check --master_port 29500 --no_local_rank"
    trained = "--module kvtrain fit --ckpt_path last --config r.yaml"
    assert (code, said) == (0, f"python -m deepspeed.launcher.runner {where} {trained}".split())
    _, said, _ = run("deepspeed.sh", "fit", DEVICES="2")
    assert said[3:5] == ["--num_gpus", "2"]
    code, said, error = run("deepspeed.sh", "fit", HOSTFILE="nowhere")
    assert (code, said) == (2, []) and "no hostfile at 'nowhere'" in error


def test_deepspeed_knows_the_options(run, tmp_path):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    hostfile = tmp_path / "hosts"
    hostfile.write_text((LAUNCH / "hostfile").read_text())
    assert runner.fetch_hostfile(str(hostfile)) == {"node0": 8, "node1": 8}
    _, said, _ = run("deepspeed.sh", "fit", "--config", "r.yaml", HOSTFILE=str(hostfile), HEAD="a")
    asked = runner.parse_args(said[3:])
    assert (asked.user_script, asked.user_args) == ("kvtrain", ["fit", "--ckpt_path", "last", "--config", "r.yaml"])
    assert asked.module and asked.no_local_rank and asked.no_ssh_check


def test_slurm_starts_the_tasks_and_goes_on(run):
    code, said, _ = run("slurm.sbatch", "fit", "--config", "r.yaml", SLURM_JOB_ID="7")
    assert (code, said) == (
        0,
        ["srun", "--wait=300", "python", "-m", "kvtrain", "fit", "--ckpt_path", "last", "--config", "r.yaml"],
    )


def test_slurm_is_asked_for_a_signal_in_time_and_for_a_place_in_the_queue():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    assert asked["signal"].startswith("USR1@") and int(asked["signal"][5:]) >= 300
    assert "requeue" in asked
    assert asked["open-mode"] == "append"  # a job that begins anew keeps its log
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]


def test_the_manifest_is_of_one_size_and_runs_the_script():
    manifest = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (group,) = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert job["parallelism"] == job["completions"] == int(environment["NODES"]) == 8
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["DEVICES"]) == 8
    assert environment["HEAD"] == f"{manifest['metadata']['name']}-{group['name']}-0-0.{manifest['metadata']['name']}"
    assert environment.keys() <= set(re.findall(r"[A-Z_]{4,}", (LAUNCH / "torchrun.sh").read_text()))
    assert (ROOT / container["command"][1]).is_file()
    assert pod["terminationGracePeriodSeconds"] > 600  # what torchrun.sh gives its workers
    recipe = yaml.safe_load((ROOT / container["args"][1].removeprefix("--config=")).read_text())
    assert (recipe["trainer"]["num_nodes"], recipe["trainer"]["devices"]) == (8, 8)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_for_many_gpus_names_its_launcher(path):
    """And says as many nodes in it as it has."""
    text, trainer = path.read_text(), yaml.safe_load(path.read_text())["trainer"]
    commands = [shlex.split(line[1:]) for line in text.splitlines() if re.match(r"#   .*\blaunch/", line)]
    nodes = trainer.get("num_nodes", 1)
    if nodes > 1:
        assert {command[command.index("--config") - 1] for command in commands} == {"check", "fit"}
    for command in commands:
        (script,) = (word for word in command if word.startswith("launch/"))
        assert (ROOT / script).is_file()
        assert command[command.index("--config") + 1] == str(path.relative_to(ROOT))
        if script.endswith("torchrun.sh") and nodes > 1:
            assert f"NODES={nodes}" in command


PAGE = (LAUNCH / "README.md").read_text()


def test_the_page_names_what_there_is():
    for path in re.findall(r"`(?:\w+=\S+ )*((?:recipes|launch)/[\w./]+)", PAGE):
        assert (ROOT / path).exists(), path
    pages = PAGE + (LAUNCH / "serve" / "README.md").read_text()
    for launcher in list_launchers():
        assert f"`launch/{launcher.path.relative_to(LAUNCH)}`" in pages


def test_a_launcher_has_five_lines_on_the_page():
    for name in ("torchrun", "deepspeed", "SLURM", "Kubernetes"):
        (section,) = re.findall(rf"^\*\*{name}\*\* .*?(?=\n\n)", PAGE, re.MULTILINE | re.DOTALL)
        assert len(section.splitlines()) == 5, name


def test_commands_of_the_page_are_read(monkeypatch):
    """Every option of every ``kvtrain`` command on it is one."""
    monkeypatch.chdir(ROOT)
    lines = [
        line.split("  #")[0]
        for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("kvtrain ")]
    assert {words[0] for words in commands} == {"recipes", "prepare", "estimate", "export", "eval"}
    for name, *words in commands:
        build_parser(name).parse_args(words)
    launched = [line for line in lines if "launch/" in line and " --config " in line]
    assert launched and all(" check " in line for line in launched)
    read_recipe(shlex.split(launched[0].split(" check ")[1]))
