"""`make docs`: the site, built strictly."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import DOCS, ROOT, navigation

pytest.importorskip("zensical", reason="needs Zensical: pip install kvtrain[docs]")
pytestmark = pytest.mark.roads
READ = ("docs", "launch", "mkdocs.yml")  # by the site


@pytest.fixture
def site(tmp_path):
    """A copy of what the site is made of, and what builds it there."""
    for name in READ:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)

    def build() -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return tmp_path, build


def test_the_site_builds_strictly(site):
    folder, build = site
    done = build()
    assert done.returncode == 0, done.stdout + done.stderr
    for page in navigation():
        text = (folder / "site" / page).with_suffix(".html").read_text()
        assert "--8&lt;--" not in text and re.search(r"<h1[^>]*>\w", text), page
    machines = (folder / "site" / "machines.html").read_text()
    assert "HOSTFILE" in machines  # of launch/README.md
    assert (folder / "site" / "images" / "quality.png").read_bytes() == (DOCS / "images" / "quality.png").read_bytes()
    addresses = {address for path in (folder / "site").rglob("*.html") for address in loaded(path.read_text())}
    assert addresses == set()  # a page asks nobody for anything


def loaded(page: str) -> list[str]:
    """What a browser would fetch from elsewhere by itself."""
    return re.findall(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="(https?://[^"]+)"', page)


@pytest.mark.parametrize("line", ["[x](nowhere.md)", "[x](serve.md#nowhere)", '--8<-- "nowhere.md"'])
def test_what_leads_nowhere_fails_the_build(site, line):
    folder, build = site
    page = folder / "docs" / "hub.md"
    page.write_text(f"{page.read_text()}\n{line}\n")
    assert build().returncode != 0


def test_what_is_loaded_is_found():
    page = '<link rel="x" href="a.css"><script async src="https://e.org/x.js"></script><a href="https://e.org">y</a>'
    assert loaded(page) == ["https://e.org/x.js"]
