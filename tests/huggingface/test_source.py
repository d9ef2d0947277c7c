"""Getting hold of transformers' tests, without a network."""

import subprocess
import tarfile

import pytest

from tests.huggingface import source


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Where they go."""
    monkeypatch.setenv("KVTRAIN_CACHE", str(tmp_path / "cache"))
    return source.cache_folder()


@pytest.fixture
def distribution(tmp_path):
    """A source distribution with a test, a module, and tests of something else inside."""
    for name in ("tests/test_one.py", "src/two.py", "src/tests/test_three.py"):
        path = tmp_path / "transformers-1.0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    archive = tmp_path / "transformers-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tmp_path / "transformers-1.0", "transformers-1.0")
    return archive


def test_tests_alone_are_kept_and_fetched_once(target, distribution, monkeypatch):
    fetched = []
    monkeypatch.setattr(source, "download", lambda _: fetched.append(1) or distribution)
    for _ in range(2):
        assert source.fetch.__wrapped__() == target
    assert len(fetched) == 1
    assert [path.relative_to(target).as_posix() for path in target.rglob("*")] == ["test_one.py"]
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == [target.name]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            subprocess.CalledProcessError(1, "pip", stderr="WARNING: a\nERROR: No matching\nERROR: b"),
            "ERROR: No matching",
        ),
        (subprocess.CalledProcessError(1, "pip", stderr=""), "no word from pip"),
        (subprocess.TimeoutExpired("pip", 1), "pip took longer than"),
    ],
)
def test_without_a_network_there_is_a_reason(target, monkeypatch, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    found = source.fetch.__wrapped__()
    assert isinstance(found, str) and found.startswith(reason)
    assert not target.exists()


def test_a_checkout_is_one(tmp_path, monkeypatch):
    monkeypatch.delenv(source.CHECKOUT, raising=False)
    assert source.checkout() is None
    monkeypatch.setenv(source.CHECKOUT, str(tmp_path))
    with pytest.raises(ValueError, match="name a checkout of transformers"):
        source.checkout()
    (tmp_path / "tests" / "generation").mkdir(parents=True)
    (tmp_path / "tests" / "generation" / "test_utils.py").write_text("")
    assert source.checkout() == tmp_path
