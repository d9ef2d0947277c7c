"""Files that are whole or not there, and their hashes."""

import errno
import hashlib

import pytest

from kvtrain import durable


def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "config.yaml"
    durable.write_text(path, "old")
    with durable.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert (path.read_text(), [other.name for other in tmp_path.iterdir()]) == ("new", ["config.yaml"])


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("no"), OSError(errno.ENOSPC, "No space left")])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, failure):
    path = tmp_path / "config.yaml"
    durable.write_text(path, "old")

    def write():
        with durable.replacing(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(type(failure)) as raised:
        write()
    assert (path.read_text(), [other.name for other in tmp_path.iterdir()]) == ("old", ["config.yaml"])
    assert getattr(raised.value, "filename", str(path)) == str(path)  # a full disk says which


def test_errors_that_have_a_name_keep_it(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, durable.replacing(tmp_path / "a"):
        (tmp_path / "none" / "b").write_text("")
    assert raised.value.filename == str(tmp_path / "none" / "b")


def test_leftovers_are_what_was_being_written(tmp_path):
    folder = durable.temporary_name(tmp_path / "step-000003.ckpt")
    (folder / "inner").mkdir(parents=True)
    durable.temporary_name(tmp_path / "metrics.csv").write_text("half")
    for name in ("step-000003.ckpt", ".hidden", "a.new"):
        (tmp_path / name).write_text("kept")
    durable.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.new", "step-000003.ckpt"]


def test_hashes_are_those_of_the_content_and_an_interruption_ends_them(tmp_path, monkeypatch):
    files = [tmp_path / str(number) for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * number * 3_000_000)
    assert durable.sha256(files) == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    class Interrupted(durable.ThreadPoolExecutor):
        def map(self, *arguments):
            super().map(*arguments)
            raise KeyboardInterrupt

    monkeypatch.setattr(durable, "ThreadPoolExecutor", Interrupted)
    endless = tmp_path / "endless"
    endless.symlink_to("/dev/zero")
    with pytest.raises(KeyboardInterrupt):
        durable.sha256([endless])
