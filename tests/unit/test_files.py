import errno
import json
import logging
import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from mdit import files
from mdit.files import (
    follow,
    point_to,
    replacing,
    replacing_directory,
    save_tensors,
    try_to_write,
    write_json,
    write_text,
)

UNKNOWN = [errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(files, "_said", set())


def answering(code):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    return refuse


def file(path, content):
    write_text(path, content)


def directory(path, content):
    with replacing_directory(path) as partial:
        (partial / "inside").write_text(content)
        (partial / "deeper").mkdir()
        (partial / "deeper" / "more").write_text(content)


def link(path, content):
    (path.parent / content).mkdir(exist_ok=True)
    point_to(path, content)


def read(path):
    if path.is_symlink():
        return os.readlink(path)
    if path.is_dir():
        (content,) = {one.read_text() for one in (path / "inside", path / "deeper" / "more")}
        return content
    return path.read_text()


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def killed_at(event, function, *args):
    """Run `function` in a process that is killed at its event-th call into the system. -> whether it came to its end"""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(name, _):
            nonlocal seen
            if name.startswith(("os.", "open", "shutil.", "ctypes.dl")):
                seen += 1
                if seen == event:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            function(*args)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("write", [file, directory, link])
@pytest.mark.parametrize("before", ["old", None])
def test_a_kill_at_any_moment_leaves_the_old_one_or_the_new_one(tmp_path, write, before):
    event, found = 0, set()
    path, done = tmp_path / "it", False
    while not done:
        if before:
            write(path, before)
        elif path.is_dir() and not path.is_symlink():
            (path / "inside").unlink(), (path / "deeper" / "more").unlink(), (path / "deeper").rmdir(), path.rmdir()
        else:
            path.unlink(missing_ok=True)
        event += 1
        done = killed_at(event, write, path, "new")
        found.add(read(path) if os.path.lexists(path) else None)
    assert event > 4 and found == {before, "new"}
    write(path, "last")  # leftovers of a kill are not in the way, and gone
    assert read(path) == "last" and hidden(tmp_path) == []


def test_a_directory_is_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *names: False)
    directory(tmp_path / "it", "old")
    event, done = 0, False
    while not done:
        event += 1
        done = killed_at(event, directory, tmp_path / "it", "new")
        with pytest.raises(ZeroDivisionError), replacing_directory(tmp_path / "it"):
            raise ZeroDivisionError
        assert read(tmp_path / "it") in ("old", "new") and hidden(tmp_path) == []
    assert event > 4 and read(tmp_path / "it") == "new"


@pytest.mark.parametrize("write", [file, directory])
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("failing", ["fsync", "rename", "replace"])
def test_a_full_disk_leaves_the_old_one_and_is_told_by_the_name_that_the_user_knows(
    tmp_path, monkeypatch, write, exchange, failing
):
    write(tmp_path / "it", "old")
    real = getattr(os, failing)

    def full(path, *names, **options):
        if failing == "fsync" or "partial" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([] if failing == "fsync" else [str(path)]))
        return real(path, *names, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, full)
        if not exchange:
            patched.setattr(files, "_exchange", lambda *names: False)
        try:
            write(tmp_path / "it", "new")
        except OSError as error:
            assert error.errno == errno.ENOSPC and "partial" not in error.filename and "it" in error.filename
    assert read(tmp_path / "it") in ("old", "new") and ".it.partial" not in hidden(tmp_path)
    assert read(tmp_path / "it") == "old" or failing != "fsync"


def test_an_exception_inside_changes_nothing(tmp_path):
    write_text(tmp_path / "it", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "it") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert read(tmp_path / "it") == "old" and hidden(tmp_path) == []
    with pytest.raises(ValueError):
        write_json(tmp_path / "it", {"loss": float("nan")})
    assert read(tmp_path / "it") == "old" and hidden(tmp_path) == []


def test_links_and_what_is_no_file_stay_what_they_are(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/target")
    for content in ("first", "second"):  # the target does not exist, then it does
        try_to_write(tmp_path / "link")
        write_text(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "target").read_text() == content
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try_to_write(tmp_path / "pipe")
    write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)


def test_whether_a_file_can_be_written_is_known_before(tmp_path):
    for path, code in ((tmp_path / "nowhere" / "x", errno.ENOENT), (tmp_path, errno.EISDIR)):
        with pytest.raises(OSError) as caught:
            try_to_write(path)
        assert (caught.value.errno, caught.value.filename) == (code, str(path))
    try_to_write(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / "x", "old")
    try_to_write(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("code", [*UNKNOWN, errno.EACCES])
def test_a_file_system_without_modes_is_none_the_worse(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "chmod", answering(code))
    save_tensors({"a": torch.ones(1)}, tmp_path / "x")
    assert torch.equal(load_file(tmp_path / "x")["a"], torch.ones(1))
    monkeypatch.setattr(os, "chmod", answering(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        save_tensors({"a": torch.ones(1)}, tmp_path / "x")


@pytest.mark.parametrize("code", UNKNOWN)
def test_a_file_system_that_cannot_sync_costs_one_line(tmp_path, monkeypatch, caplog, code):
    monkeypatch.setattr(os, "fsync", answering(code))
    with caplog.at_level(logging.WARNING):
        for content in ("one", "two"):
            file(tmp_path / "file", content)
            directory(tmp_path / "directory", content)
            assert read(tmp_path / "file") == read(tmp_path / "directory") == content
    assert [record.getMessage().count("cannot sync") for record in caplog.records] == [1]


def test_a_disk_that_fails_to_sync_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", answering(errno.EIO))
    with pytest.raises(OSError, match="Input/output error.*it"):
        file(tmp_path / "it", "new")
    with pytest.raises(OSError):
        directory(tmp_path / "directory", "new")
    assert not (tmp_path / "directory").exists() and hidden(tmp_path) == []


@pytest.mark.parametrize("code", [*UNKNOWN, errno.EACCES])
def test_without_links_a_file_names_the_directory(tmp_path, monkeypatch, caplog, code):
    monkeypatch.setattr(os, "symlink", answering(code))
    with caplog.at_level(logging.WARNING):
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            point_to(tmp_path / "latest", name)
            assert follow(tmp_path / "latest") == tmp_path / name
    assert len(caplog.records) == 1 and "no symbolic links" in caplog.records[0].getMessage()
    monkeypatch.undo()
    point_to(tmp_path / "latest", "one")  # the same run, on a file system with links
    assert (tmp_path / "latest").is_symlink() and hidden(tmp_path) == []


def test_a_directory_where_a_link_belongs_is_kept(tmp_path, caplog):
    for number in ("", "1"):
        (tmp_path / "latest").mkdir()
        (tmp_path / "latest" / "copied").touch()
        link(tmp_path / "latest", "new")
        assert (tmp_path / "latest").is_symlink() and (tmp_path / f"latest.old{number}" / "copied").exists()
        (tmp_path / "latest").unlink()


@pytest.mark.parametrize("content", [b"", b"nowhere", b"..", b"/", b"a/b", b"\xff\xfe", b"x" * 10_000, b"\0"])
def test_what_names_no_directory_is_not_followed(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert follow(tmp_path / "file") == tmp_path / "file"
    assert follow(tmp_path / "absent") == tmp_path / "absent" and follow(tmp_path) == tmp_path


def test_tensors_that_cannot_be_saved_are_an_os_error(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    save_tensors(tensors, tmp_path / "x", {"k": "v"})
    assert torch.equal(load_file(tmp_path / "x")["a"], tensors["a"])
    with pytest.raises(FileNotFoundError) as caught:
        save_tensors(tensors, tmp_path / "nowhere" / "x")
    assert caught.value.filename == str(tmp_path / "nowhere" / "x")


def test_json_is_read_by_anyone(tmp_path):
    write_json(tmp_path / "x", {"caption": "é漢", "n": [1, 2.5, None]})
    assert json.loads((tmp_path / "x").read_bytes()) == {"caption": "é漢", "n": [1, 2.5, None]}
