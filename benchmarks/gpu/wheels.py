"""Packages from a folder of wheels, where there is no network; those of the interpreter are seen and left alone."""

import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("transformers", "pytest", "hypothesis")
OPTIONAL = ("liger-kernel", "flash-attn", "flash-linear-attention")


def requirement(package: str) -> str:
    """A package with the lower bound that the project has for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    known = [line.partition(";")[0].strip() for line in lines if re.split(r"[<>=;\[ ]", line)[0] == package]
    return known[0] if known else package


def environment(folder: Path) -> Path:
    """A virtual environment that sees all that this interpreter sees; returns its interpreter."""
    venv.EnvBuilder(system_site_packages=True, with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    inside = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", inside], capture_output=True, text=True, check=True).stdout.strip()
    # Lines of a .pth file that begin with import are run; this way .pth files out there count as well.
    outside = {sysconfig.get_path(kind): None for kind in ("purelib", "platlib")}
    lines = [f"import site; site.addsitedir({path!r})\n" for path in outside]
    (Path(site) / "outside.pth").write_text("".join(lines), encoding="utf-8")
    return python


def install(python: Path, wheels: Path, *requirements: str) -> str | None:
    """Install what is missing from wheels alone; returns why it cannot be, in a line."""
    options = ["--no-index", "--find-links", str(wheels), "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return (said[-1] if said else f"pip ended with {done.returncode}") if done.returncode else None


def provide(wheels: Path, folder: Path) -> tuple[Path, list[str]]:
    """An interpreter with what is missing, and a line for every package that no wheel brought.

    Args:
        wheels: Folder of wheels.
        folder: Where the environment is made.

    Raises:
        ValueError: There are no wheels there, or something needed is not among them.
    """
    if not any(wheels.glob("*.whl")):
        raise ValueError(f"{wheels} holds no wheels")
    python = environment(folder)
    if problem := install(python, wheels, *map(requirement, NEEDED)):
        raise ValueError(f"{', '.join(NEEDED)} must come from {wheels} or be installed: {problem}")
    problems = {package: install(python, wheels, requirement(package)) for package in OPTIONAL}
    return python, [f"{package}: no wheel fits: {problem}" for package, problem in problems.items() if problem]
