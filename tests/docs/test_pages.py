"""What every page says, looked at without running it: blocks, commands, links, pictures, paths."""

import json
import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, README, ROOT, Block, blocks, navigation
from tests.docs.reader import check

BLOCKS = [block for page in PAGES for block in blocks(page)]
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
ROOMS = "kvtrain|recipes|tests|configs|launch|benchmarks|docs"
README_LINES = 90
FIGURES = {"README.md": README, "index.md": DOCS / "index.md", "results.md": DOCS / "results.md"}


def named(blocks: list[Block]) -> list:
    return [pytest.param(block, id=str(block)) for block in blocks]


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def broken(page: Path) -> list[str]:
    """Links of a page, pictures included, that lead nowhere."""
    found = []
    for match in LINK.finditer(page.read_text()):
        target, _, anchor = match["target"].partition("#")
        path = (page.parent / target).resolve() if target else page
        if "://" not in target and not (path.exists() and (not anchor or anchor in anchors(path))):
            found.append(match["target"])
    return found


def test_the_readme_is_a_page_and_the_site_has_all_of_docs():
    assert len(README.read_text().splitlines()) <= README_LINES
    assert sorted(navigation()) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert len(BLOCKS) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# One thing: two\n[x](#one-thing-two) ![p](p.png) [y](a.md#three) [z](b.md) [w](https://e.org)\n")
    assert broken(page) == ["p.png", "a.md#three", "b.md"]


def test_paths_that_pages_name_exist():
    for page in PAGES:
        for path in re.findall(rf"`((?:{ROOMS})/[\w./-]+)`", page.read_text()):
            planned = re.search(r"/x\b|<|/test_x", path)  # of who adds an architecture
            assert planned or list(ROOT.glob(path)), f"{page.name}: {path}"


@pytest.mark.parametrize("head", ["", "cpp", 'bash title="whatever you like"', 'python tilte="in x.py"'])
def test_no_block_is_passed_over_in_silence(tmp_path, head):
    page = tmp_path / "a.md"
    page.write_text(f"words\n\n```{head}\nx\n```\n")
    with pytest.raises(ValueError, match=r"a\.md:3: "):
        blocks(page)


@pytest.mark.parametrize("block", named([one for one in BLOCKS if one.language == "bash"]))
def test_commands_are_read(block, monkeypatch):
    """Programs are known, and so is every option; recipes of those that need another machine are parsed as well."""
    monkeypatch.chdir(ROOT)
    for words in block.commands():
        if block.elsewhere or not {"fit", "validate", "estimate", "check"} & set(words[:2]):
            check(words)


@pytest.mark.parametrize(
    "line",
    [
        "kvtrain export a",
        "kvtrain eval m --taks x",
        "kvtrain fit --config recipes/tiny/dmc.yaml --data.corpsu x",
        'kvtrain generate m --prompt x --method "H2O(bugdet=3)"',
        "A=1 kvtrain estimate --config recipes/no.yaml",
        "make nothing",
        "pip install '.[nothing]'",
        "docker build --build-arg NO=1 .",
        "python no.py",
        "curl x",
    ],
)
def test_a_wrong_command_is_found(tmp_path, monkeypatch, line):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "a.md"
    page.write_text(f"```bash\n{line}\n```\n")
    (block,) = blocks(page)
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check(block.commands()[0])


@pytest.mark.parametrize("block", named([one for one in BLOCKS if one.language in ("python", "json")]))
def test_code_is_code(block):
    if block.language == "json":
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
        return
    compile(block.text, str(block), "exec")
    if block.part_of and (ROOT / block.part_of).is_file():
        there = (ROOT / block.part_of).read_text().splitlines()
        assert [line for line in block.text.splitlines() if line.strip() and line not in there] == []
