"""Files are complete or absent, lines are complete or skipped."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rating_train import files
from rating_train.errors import UserError
from rating_train.files import (
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    read_json,
    read_json_lines,
    sha256_file,
    sha256_json,
)


def test_a_written_file_holds_exactly_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"", b"old", bytes(range(256)) * 1000):
        atomic_write_bytes(path, content)
        assert path.read_bytes() == content
    atomic_write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_and_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "a.json"
    atomic_write_json(path, {"old": True})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(files.os, moment, interrupt)
        atomic_write_json(path, {"old": False})
    assert read_json(path) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_json(path, {"x": 1})
    for value in (float("nan"), float("inf"), {1, 2}, object()):
        with pytest.raises((ValueError, TypeError)):
            atomic_write_json(path, {"x": value})
    assert read_json(path) == {"x": 1}


KILLED = """
import sys
from rating_train.files import atomic_write_text
n = 0
while True:
    n += 1
    atomic_write_text(sys.argv[1], f"{n} " * 50_000)
    if n == 3:
        print("ready", flush=True)
"""


def test_a_process_killed_while_writing_leaves_a_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    complete = 0
    for _ in range(200):  # a concurrent reader never sees a part either
        words = path.read_text().split()
        assert len(words) == 50_000 and len(set(words)) == 1
        complete += 1
    process.kill()
    process.wait()
    process.stdout.close()
    words = path.read_text().split()
    assert complete == 200 and len(words) == 50_000 and len(set(words)) == 1


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def write(letter: str) -> None:
        for _ in range(20):
            atomic_write_text(path, letter * 10_000)

    threads = [threading.Thread(target=write, args=(c,)) for c in "abc"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(path.read_text())) == 1 and len(list(tmp_path.iterdir())) == 1


def test_reading_json_names_the_file_that_is_missing_or_torn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file not found.*absent\.json"):
        read_json(tmp_path / "absent.json")
    for content in (b"", b'{"a": ', b"\xff\xfe{}"):
        (tmp_path / "torn.json").write_bytes(content)
        with pytest.raises(UserError, match=r"not valid JSON.*torn\.json"):
            read_json(tmp_path / "torn.json")


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        list(read_json_lines(path))


def test_checksums_are_sha256(tmp_path: Path) -> None:
    content = os.urandom((1 << 22) + 17)
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert sha256_json({}) == hashlib.sha256(b"{}").hexdigest()


def test_a_fingerprint_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]}, [["a", 1]], {"a": None}, {"a": 1.5}]
    assert len({sha256_json(v) for v in different}) == len(different)


def test_a_lock_is_held_by_one_or_shared_by_several(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as a, open(tmp_path / "lock") as b, open(tmp_path / "lock") as c:
        assert files.hold_lock(a, shared=True) and files.hold_lock(b, shared=True)
        assert files.hold_lock(c) is False
        a.close()
        b.close()
        assert files.hold_lock(c) is True


def test_a_file_system_without_locks_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with open(tmp_path / "lock", "w") as f:
        assert files.hold_lock(f) is None


# --- a file system that is away for a moment ----------------------------------------------------------


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RETRY_PAUSES", (0.0, 0.0))


def failing(errors: list[int], action: Callable[..., Any]) -> Callable[..., Any]:
    """``action``, but the first calls raise these errors instead."""

    def call(*args: Any, **more: Any) -> Any:
        if errors:
            raise OSError(errors.pop(0), "injected")
        return action(*args, **more)

    return call


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ESHUTDOWN, errno.ETIMEDOUT])
def test_a_transient_error_is_retried_and_logged(
    number: int, no_pauses: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert files.retry(failing([number, number], lambda: "done"), "the file") == "done"
    assert [m.startswith("the file: ") for m in caplog.messages] == [True, True]


def test_retries_are_bounded_and_other_errors_are_raised_at_once(no_pauses: None) -> None:
    errors = [errno.EIO] * 4
    with pytest.raises(OSError, match="injected"):
        files.retry(failing(errors, lambda: None), "x")
    assert len(errors) == 1, "three attempts"
    errors = [errno.ENOSPC, errno.EIO]
    with pytest.raises(OSError, match="injected"):
        files.retry(failing(errors, lambda: None), "x")
    assert errors == [errno.EIO]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ESHUTDOWN, errno.EACCES])
def test_a_marker_that_cannot_be_looked_up_counts_as_absent_and_is_logged_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    marker = files.MarkerFile(tmp_path / "STOP")
    assert not marker.is_present() and caplog.messages == []
    (tmp_path / "STOP").touch()
    with monkeypatch.context() as m:
        m.setattr(os, "stat", failing([number] * 9, os.stat))
        assert [marker.is_present() for _ in range(5)] == [False] * 5
    assert marker.is_present()
    assert [str(tmp_path / "STOP") in m for m in caplog.messages] == [True]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_atomic_write_starts_anew_after_a_transient_error(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    """Anew: after a failed fsync the kernel may have dropped what was written."""
    written: list[int] = []

    def counting(*args: Any, **more: Any) -> Any:
        written.append(1)
        return open(*args, **more)

    monkeypatch.setattr(files, "open", counting, raising=False)
    monkeypatch.setattr(os, call, failing([errno.EIO], getattr(os, call)))
    atomic_write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x"]
    assert len(written) == 2


def test_an_error_after_the_rename_took_place_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    rename, calls = os.rename, []

    def lost_reply(source: Any, target: Any) -> None:
        calls.append(1)
        rename(source, target)
        raise OSError(errno.EIO, "the server's reply was lost")

    (tmp_path / "a").mkdir()
    monkeypatch.setattr(os, "rename", lost_reply)
    files.rename(tmp_path / "a", tmp_path / "b", lambda: not (tmp_path / "a").exists())
    assert (tmp_path / "b").is_dir() and len(calls) == 1
    with pytest.raises(OSError, match="No such file"):
        files.rename(tmp_path / "a", tmp_path / "c", lambda: True)


def test_a_rename_that_did_not_take_place_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(os, "rename", failing([errno.ESTALE, errno.EIO], os.rename))
    files.rename(tmp_path / "a", tmp_path / "b", lambda: False)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_file_of_another_host_is_waited_for(tmp_path: Path) -> None:
    late = threading.Timer(0.3, (tmp_path / "late").touch)
    late.start()
    assert files.wait_until_visible(tmp_path / "late", 30)
    late.join()
    assert not files.wait_until_visible(tmp_path / "never", 0.1)


def test_a_folder_is_made_although_the_reply_is_lost_or_another_host_made_it_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    mkdir, stat, replies = os.mkdir, os.stat, [errno.EIO]

    def lost_reply(*args: Any, **more: Any) -> None:
        mkdir(*args, **more)
        if replies:
            raise OSError(replies.pop(), "the server's reply was lost")

    monkeypatch.setattr(os, "mkdir", lost_reply)
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not replies

    looks = [errno.ENOENT, errno.ENOENT]  # made by another host, and not visible yet

    def unseen(path: Any, *args: Any, **more: Any) -> Any:
        if str(path).endswith("b") and looks:
            raise FileNotFoundError(looks.pop(), "not visible yet")
        return stat(path, *args, **more)

    with monkeypatch.context() as m:
        m.setattr(os, "stat", unseen)
        files.make_folder(tmp_path / "a" / "b")
    assert not looks, "it was waited for"
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        files.make_folder(tmp_path / "file")


def test_a_tree_is_removed_although_files_of_another_host_are_not_visible_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    """Neither a name that is listed and then missing nor a directory that is not as empty as it looks ends it."""
    unlink, failures = os.unlink, [errno.ENOENT]

    def unseen(*args: Any, **more: Any) -> None:
        if failures:
            raise FileNotFoundError(failures.pop(), "not visible yet")
        unlink(*args, **more)

    (tmp_path / "tree" / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (tmp_path / "tree" / name).touch()
    monkeypatch.setattr(os, "unlink", unseen)
    files.remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists() and not failures
    files.remove_tree(tmp_path / "tree")


def test_what_nobody_waits_for_is_tried_for_longer(monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    monkeypatch.setattr(files, "_PATIENT_PAUSES", (0.0, 0.0))
    assert files.retry(failing([errno.EIO] * 4, lambda: "done"), "the file", patient=True) == "done"


def test_a_failed_attempt_leaves_no_temporary_file_although_removing_it_fails_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    monkeypatch.setattr(os, "replace", failing([errno.EIO], os.replace))
    monkeypatch.setattr(os, "unlink", failing([errno.ESTALE], os.unlink))
    atomic_write_text(tmp_path / "x", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
