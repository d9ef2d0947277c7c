"""A push that is broken off at any of its requests, in any way: the branch is the old commit or the whole new one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvtrain_cli import main
from tests.export.test_push import NAME, contents, held, pushes, write_folder
from tests.hub.client import local_hub
from tests.hub.server import WRITER, Repository
from tests.processes import KVTRAIN, ROOT, Forked

pytestmark = pytest.mark.roads
OLD = {"README.md": b"what was there before", "model.safetensors": b"an older model"}
CLIENT = (
    "import sys, time\nfrom tests.hub.client import point_at\npoint_at(*sys.argv[1:3])\n"
    "from huggingface_hub.utils import _http\n_http.time = type('Time', (), {'sleep': lambda seconds: None})\n"
    "sys.argv = ['kvtrain', *sys.argv[3:]]\n"
)
LAST = 40  # no push here has as many requests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of some shards."""
    path = tmp_path_factory.mktemp("pushed") / "out"
    write_folder(path, shards="30KB")
    return path


@pytest.fixture
def hub(tmp_path):
    """For a client in another process."""
    with local_hub(tmp_path) as hub:
        yield hub


class Push:
    """``kvtrain push`` in a process of its own, and everything that it says."""

    def __init__(self, hub, folder, log):
        self.log = log
        arguments = [hub.address, str(log.parent / "cache"), "push", str(folder), NAME]
        self.process = Forked(CLIENT + KVTRAIN, arguments, log, HF_TOKEN=WRITER, PYTHONPATH=str(ROOT))

    def wait(self):
        code = self.process.wait()
        said = self.log.read_text()
        assert WRITER not in said and "signature=secret" not in said and "Traceback" not in said, said
        return code


def prepare(hub, known):
    """A repository with an older model, or none."""
    hub.repositories.clear(), hub.large.clear(), hub.calls.clear()
    hub.before = hub.after = lambda count: None
    if known:
        hub.repositories[NAME] = Repository(private=False)
        hub.repositories[NAME].commit("main", OLD)


def break_off(hub, way, number, push):
    """Let the push's request of this number go wrong; the hooks run in the Hub, which has the process' number."""

    def kill(count):
        if count == number:
            os.kill(push().process.pid, signal.SIGKILL)
            return 0
        return None

    match way:
        case "network gone":
            hub.before = lambda count: 0 if count >= number else None
        case "answer lost, network gone":
            hub.before = lambda count: 0 if count > number else None
            hub.after = lambda count: 0 if count == number else None
        case "answer lost":
            hub.after = lambda count: 0 if count == number else None
        case "killed":
            hub.before = kill
        case "killed once it was carried out":
            hub.after = kill


WAYS = ("network gone", "answer lost, network gone", "answer lost", "killed once it was carried out", "killed")
GRID = [
    *(pytest.param(way, True, id=f"{way}, older model") for way in WAYS),
    *(pytest.param(way, False, id=f"{way}, new repository") for way in WAYS[1::2]),
    *(pytest.param(way, False, id=f"{way}, new repository", marks=pytest.mark.slow) for way in WAYS[::2]),
]


@pytest.mark.parametrize(("way", "known"), GRID)
def test_the_branch_is_the_old_commit_or_the_whole_new_one(hub, folder, tmp_path, way, known):
    new, outcomes = contents(folder), []
    for number in range(1, LAST):
        prepare(hub, known)
        started = []
        break_off(hub, way, number, lambda started=started: started[0])
        started.append(Push(hub, folder, tmp_path / f"{number}.log"))
        code = started[0].wait()
        reached = len(hub.calls) >= number
        assert code == 0 if not reached else code in ((-signal.SIGKILL,) if "killed" in way else (0, 2))
        if code == 2:
            last = started[0].log.read_text().strip().splitlines()[-1]
            assert last.startswith(f"kvtrain: error: {NAME}@main: not pushed (") and last.endswith("is complete")
        found = held(hub) if NAME in hub.repositories else {}
        assert found in ({} if not known else OLD, new)
        outcomes.append(found == new)
        if not reached:
            break
        prepared, sent = len(hub.calls), set(hub.large)
        hub.before = hub.after = lambda count: None
        assert main(["push", str(folder), NAME]) == 0
        assert held(hub) == new
        assert sent.isdisjoint(call.removeprefix("PUT /lfs/") for call in hub.calls[prepared:])
        assert not outcomes[-1] or not [
            call for call in hub.calls[prepared:] if call.startswith("PUT") or "/commit/" in call
        ]
    assert len(outcomes) > 10 and outcomes[-1] and not outcomes[0]


def test_as_a_shell_starts_it(hub, folder, tmp_path):
    """With the environment that the client reads when it is imported; the token is in no argument and no file."""
    seen = []

    def look(count):
        seen.append(Path(f"/proc/{process.pid}/cmdline").read_bytes())

    hub.before = look
    environment = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": WRITER}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvtrain", "push", str(folder), NAME, "--private"],
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert held(hub) == contents(folder) and hub.repositories[NAME].private and len(pushes(hub)) > 1
    assert seen and all(b"push" in line and WRITER.encode() not in line for line in seen)
    written = [path for path in [*tmp_path.rglob("*"), *folder.rglob("*")] if path.is_file()]
    assert written and not [path for path in written if WRITER.encode() in path.read_bytes()]
