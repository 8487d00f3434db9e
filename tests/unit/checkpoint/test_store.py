"""The directory protocol: only committed checkpoints exist, and damaged ones are never loaded."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rating_train import files as package_files
from rating_train.checkpoint import cleanup, store
from rating_train.checkpoint.store import BEST, COMPLETE, LATEST, InvalidCheckpoint
from rating_train.errors import UserError

FILES = {
    "state.json": b'{"step": 1}\n',
    "rank_00000.pt": bytes(range(256)) * 40,
    "zero/shard_0.pt": b"weights" * 1000,
    "zero/shard_1.pt": b"other weights" * 1000,
    "empty.bin": b"",
}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file system shows every file at once: one that is missing is not waited for."""
    monkeypatch.setattr(store, "VISIBLE_SECONDS", 0.0)


def write(directory: Path, files: dict[str, bytes] | None = None) -> None:
    for name, content in (FILES if files is None else files).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def save(root: Path, step: int, files: dict[str, bytes] | None = None) -> Path:
    temporary = store.begin(root, step)
    write(temporary, files)
    return store.commit(temporary, step, store.seal(temporary, store.relative_files(temporary)))


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def problem(directory: Path) -> str:
    with pytest.raises(InvalidCheckpoint) as caught:
        store.verify(directory)
    return str(caught.value)


# --- the commit ---------------------------------------------------------------------------------------


def test_a_committed_checkpoint_verifies_and_holds_what_was_written(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 500)
    assert path == tmp_path / "checkpoints" / "step_00000500"
    content = store.verify(path)
    assert content["step"] == 500 and set(content["files"]) == set(FILES)
    assert {n: (path / n).read_bytes() for n in FILES} == FILES
    assert names(tmp_path / "checkpoints") == ["step_00000500"], "no temporary directory remains"


def test_before_the_commit_there_is_no_checkpoint(tmp_path: Path) -> None:
    temporary = store.begin(tmp_path, 500)
    write(temporary)
    store.seal(temporary, store.relative_files(temporary))
    assert store.steps_present(tmp_path) == []
    assert store.newest_valid(tmp_path) == (None, [])


def test_two_saves_of_one_step_never_share_a_temporary_directory(tmp_path: Path) -> None:
    assert len({store.begin(tmp_path, 7) for _ in range(20)}) == 20


def test_files_sealed_by_several_ranks_form_one_checkpoint(tmp_path: Path) -> None:
    temporary = store.begin(tmp_path, 3)
    write(temporary)
    every = store.relative_files(temporary)
    parts = [store.seal(temporary, every[i::2]) for i in range(2)]
    assert store.verify(store.commit(temporary, 3, {**parts[0], **parts[1]}))["files"] == {
        **parts[1],
        **parts[0],
    }


def test_undeclared_and_missing_files_are_refused(tmp_path: Path) -> None:
    temporary = store.begin(tmp_path, 3)
    write(temporary)
    files = store.seal(temporary, store.relative_files(temporary))
    (temporary / "zero" / "stray.pt").write_bytes(b"x")
    with pytest.raises(InvalidCheckpoint, match=r"are not the files described: zero/stray\.pt"):
        store.commit(temporary, 3, files)
    (temporary / "zero" / "stray.pt").unlink()
    (temporary / "rank_00000.pt").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"are not the files described: rank_00000\.pt"):
        store.commit(temporary, 3, files)
    assert store.steps_present(tmp_path) == [] and not (temporary / COMPLETE).exists()


def test_a_file_that_grew_after_sealing_is_refused(tmp_path: Path) -> None:
    temporary = store.begin(tmp_path, 3)
    write(temporary)
    files = store.seal(temporary, store.relative_files(temporary))
    with open(temporary / "state.json", "ab") as f:
        f.write(b" ")
    with pytest.raises(InvalidCheckpoint, match=r"state\.json has 13 bytes, but was described with 12"):
        store.commit(temporary, 3, files)
    assert store.steps_present(tmp_path) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4)
    path = save(tmp_path, 4, {"state.json": b"new"})
    assert store.verify(path)["files"].keys() == {"state.json"} and names(tmp_path) == ["step_00000004"]


@pytest.mark.parametrize(
    ("call", "nth"),
    [
        ("replace", 1),
        ("rename", 1),
        ("rename", 2),
    ],
)
def test_a_crash_while_a_step_is_saved_again_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int
) -> None:
    """Crash at the n-th such call, if there are so many, then restart as a run does."""
    save(tmp_path, 4)
    original, calls = getattr(os, call), 0

    def crash(*args: object, **more: object) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise KeyboardInterrupt
        original(*args, **more)

    with monkeypatch.context() as m, contextlib.suppress(KeyboardInterrupt):
        m.setattr(os, call, crash)
        save(tmp_path, 4, {"state.json": b"new"})
    assert calls
    cleanup.sweep(tmp_path)
    found, _ = store.newest_valid(tmp_path)
    assert found is not None and found.step == 4


# --- verify -------------------------------------------------------------------------------------------


def test_a_missing_marker_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / COMPLETE).unlink()
    assert "never committed" in problem(path)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 300, b"{", b"null", b"[]", b"{}", b'"x"', b"\xff\xfe", b"3"]
)
def test_an_empty_or_torn_marker_is_found(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 5)
    (path / COMPLETE).write_bytes(content)
    assert f"{COMPLETE} cannot be read" in problem(path)


def test_a_marker_torn_at_any_length_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    original = (path / COMPLETE).read_bytes()
    for length in range(len(original) - 2):  # all but the last brace and the newline after it
        (path / COMPLETE).write_bytes(original[:length])
        assert problem(path)


@pytest.mark.parametrize("change", [{"version": 2}, {"files": {}}, {"files": []}])
def test_a_marker_of_another_version_or_without_files_is_found(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path = save(tmp_path, 5)
    content = json.loads((path / COMPLETE).read_text())
    (path / COMPLETE).write_text(json.dumps({**content, **change}))
    assert "not of this version, or empty" in problem(path)


@pytest.mark.parametrize("name", [n for n in FILES if n != "empty.bin"])
@pytest.mark.parametrize(
    "damage", ["truncated", "emptied", "longer", "flipped", "zeroed", "deleted", "a folder"]
)
def test_every_damage_to_every_file_is_found(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 5)
    file, content = path / name, bytearray((path / name).read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "emptied":
        file.write_bytes(b"")
    elif damage == "longer":
        file.write_bytes(content + b"\0")
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "zeroed":
        file.write_bytes(bytes(len(content)))
    else:
        file.unlink()
        if damage == "a folder":
            file.mkdir()
    assert problem(path).startswith(name)


def test_one_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    rng = random.Random(2)
    for _ in range(60):
        name = rng.choice([n for n in FILES if n != "empty.bin"])
        original = (path / name).read_bytes()
        damaged = bytearray(original)
        damaged[rng.randrange(len(original))] ^= 1 << rng.randrange(8)
        (path / name).write_bytes(damaged)
        assert name in problem(path)
        (path / name).write_bytes(original)
    store.verify(path)


def test_two_files_that_changed_places_are_found(tmp_path: Path) -> None:
    path = save(tmp_path, 5, {"a.pt": b"1234", "b.pt": b"5678"})
    a, b = (path / "a.pt").read_bytes(), (path / "b.pt").read_bytes()
    (path / "a.pt").write_bytes(b)
    (path / "b.pt").write_bytes(a)
    assert "SHA-256" in problem(path)


def test_a_renamed_directory_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    renamed = path.rename(tmp_path / "step_00000006")
    assert "belongs to step 5" in problem(renamed)


def test_any_changed_byte_of_the_marker_gives_a_verdict_and_no_other_exception(tmp_path: Path) -> None:
    """A flipped byte may hit a space, which leaves the marker valid, or a key, which does not."""
    path = save(tmp_path, 5, {"a.pt": b"1234"})
    original = (path / COMPLETE).read_bytes()
    for position in range(len(original)):
        for replacement in (b"x", b"0", b'"', b"-"):
            (path / COMPLETE).write_bytes(original[:position] + replacement + original[position + 1 :])
            try:
                store.verify(path)
            except InvalidCheckpoint:
                continue


# --- the newest one that verifies ---------------------------------------------------------------------


def test_the_newest_valid_checkpoint_is_taken_and_skipped_ones_are_named_with_reasons(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step)
    (tmp_path / "step_00000020" / COMPLETE).unlink()
    (tmp_path / "step_00000015" / "state.json").write_bytes(b"")
    found, skipped = store.newest_valid(tmp_path)
    assert found == store.Found(10, tmp_path / "step_00000010")
    assert [(s.step, s.path.name) for s in skipped] == [(20, "step_00000020"), (15, "step_00000015")]
    assert "never committed" in skipped[0].problem and "state.json" in skipped[1].problem


def test_newest_means_the_highest_step_not_the_latest_name_or_time(tmp_path: Path) -> None:
    for step in (123_456_789, 99_999_999, 7):
        save(tmp_path, step)
    found, _ = store.newest_valid(tmp_path)
    assert found is not None and found.step == 123_456_789
    assert [s for s, _ in store.steps_present(tmp_path)] == [123_456_789, 99_999_999, 7]


def test_if_none_verifies_the_error_lists_all_reasons(tmp_path: Path) -> None:
    for step in (5, 10):
        (save(tmp_path, step) / "state.json").unlink()
    with pytest.raises(UserError, match=r"none can be trusted: step_00000010: state\.json.*step_00000005"):
        store.newest_valid(tmp_path)


def test_no_checkpoints_at_all_is_no_error(tmp_path: Path) -> None:
    assert store.newest_valid(tmp_path) == (None, [])
    assert store.newest_valid(tmp_path / "absent") == (None, [])


def test_directories_with_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    for name in ("step_5", "step_00000005.tmp-00ff", "step_00000005_old", "xstep_00000005", "step_0000000a"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000006").write_text("a file")
    assert store.steps_present(tmp_path) == []


# --- pointers -----------------------------------------------------------------------------------------


def test_a_pointer_names_a_step_and_is_replaced_atomically(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    store.point(tmp_path, BEST, 5, value=0.7)
    store.point(tmp_path, LATEST, 5)
    store.point(tmp_path, LATEST, 10)
    assert (store.pointed_step(tmp_path, LATEST), store.pointed_step(tmp_path, BEST)) == (10, 5)
    assert json.loads((tmp_path / BEST).read_text()) == {
        "step": 5,
        "directory": "step_00000005",
        "value": 0.7,
    }
    assert names(tmp_path) == [BEST, LATEST, "step_00000005", "step_00000010"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"{}", b'{"step": "x"}', b'{"step": null}', b"\xff"]
)
def test_a_torn_or_missing_pointer_is_none(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 5)
    assert store.pointed_step(tmp_path, LATEST) is None
    (tmp_path / LATEST).write_bytes(content)
    assert store.pointed_step(tmp_path, LATEST) is None


def test_a_dangling_pointer_is_none(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    store.point(tmp_path, LATEST, 6)
    assert store.pointed_step(tmp_path, LATEST) is None
    store.point(tmp_path, LATEST, 5)
    (path / COMPLETE).unlink()
    assert store.pointed_step(tmp_path, LATEST) is None


# --- pruning and sweeping -----------------------------------------------------------------------------


def test_pruning_keeps_the_newest_the_best_the_latest_and_every_nth(tmp_path: Path) -> None:
    for step in range(1, 13):
        save(tmp_path, step)
    store.point(tmp_path, BEST, 3)
    store.point(tmp_path, LATEST, 12)
    assert cleanup.prune(tmp_path, keep_last=2, keep_every=5) == [9, 8, 7, 6, 4, 2, 1]
    assert sorted(s for s, _ in store.steps_present(tmp_path)) == [3, 5, 10, 11, 12]
    assert cleanup.prune(tmp_path, keep_last=2, keep_every=5) == []


def test_pruning_keeps_latest_even_if_it_is_not_among_the_newest(tmp_path: Path) -> None:
    """After a return to an older checkpoint, the next save does not have the highest step."""
    for step in (5, 10, 15):
        save(tmp_path, step)
    store.point(tmp_path, LATEST, 5)
    cleanup.prune(tmp_path, keep_last=1, keep_every=0)
    assert sorted(s for s, _ in store.steps_present(tmp_path)) == [5, 15]


def test_uncommitted_directories_are_not_counted_among_the_newest(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    for step in (15, 20):
        (save(tmp_path, step) / COMPLETE).unlink()
    assert cleanup.prune(tmp_path, keep_last=1, keep_every=0) == [5]
    assert (tmp_path / "step_00000010" / COMPLETE).is_file()


def test_torn_pointers_do_not_stop_pruning(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    (tmp_path / BEST).write_text("{")
    assert cleanup.prune(tmp_path, keep_last=1, keep_every=0) == [5]


def test_a_checkpoint_is_deleted_marker_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        cleanup.prune(tmp_path, keep_last=1, keep_every=0)
    (left,) = tmp_path.glob("step_00000005*")
    assert (left / "zero" / "shard_0.pt").exists() and not (left / COMPLETE).exists()
    found, skipped = store.newest_valid(tmp_path)
    assert found is not None and found.step == 10 and not skipped
    monkeypatch.undo()
    assert cleanup.sweep(tmp_path) == [left.name] and not left.exists()


def test_sweeping_removes_leftovers_of_interrupted_saves_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 5)
    store.point(tmp_path, LATEST, 5)
    leftovers = [store.begin(tmp_path, step) for step in (10, 10, 123_456_789)]
    for leftover in leftovers:
        write(leftover)
    mine = tmp_path / "step_00000010.tmp-notes"
    mine.mkdir()
    (tmp_path / "step_00000010.tmp-00ff").write_text("a file")
    before = set(names(tmp_path))
    assert cleanup.sweep(tmp_path) == sorted(p.name for p in leftovers)
    assert set(names(tmp_path)) == before - {p.name for p in leftovers}
    store.verify(tmp_path / "step_00000005")


def test_sweeping_without_leftovers_is_not_an_error(tmp_path: Path) -> None:
    assert cleanup.sweep(tmp_path / "absent") == [] == cleanup.sweep(tmp_path)


SAVER = """
import sys
import time
from pathlib import Path
from rating_train.checkpoint import cleanup, store
root = Path(sys.argv[1])
step = 0
while True:
    step += 1
    temporary = store.begin(root, step)
    for i in range(3):
        (temporary / f"{i}.pt").write_bytes(bytes([step % 256]) * 200_000)
    store.commit(temporary, step, store.seal(temporary, store.relative_files(temporary)))
    store.point(root, store.LATEST, step)
    cleanup.prune(root, 2, 0)
    print(step, flush=True)
"""


@pytest.mark.parametrize("pause_ms", [0, 3, 7, 13])
def test_a_process_killed_at_any_moment_leaves_its_last_announced_checkpoint(
    tmp_path: Path, pause_ms: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    time.sleep(pause_ms / 1000)
    process.kill()
    announced = [5, *(int(line) for line in process.stdout if line.endswith("\n"))][-1]
    process.wait()
    process.stdout.close()
    found, _ = store.newest_valid(tmp_path)
    assert found is not None and announced <= found.step <= announced + 1
    cleanup.sweep(tmp_path)
    assert not [n for n in names(tmp_path) if "tmp" in n and n.startswith("step")]


def test_the_store_needs_no_torch() -> None:
    code = "import sys, rating_train.checkpoint.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- a file system that fails for a moment, or shows files late ---------------------------------------


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_files, "RETRY_PAUSES", (0.0, 0.0))


def test_a_pointer_that_cannot_be_read_keeps_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    """best.json names step 5: taken for missing, it would cost the best checkpoint."""
    for step in (5, 10, 15):
        save(tmp_path, step)
    store.point(tmp_path, BEST, 5)
    read_text = Path.read_text

    def stale(path: Path, *args: str) -> str:
        if path.name == BEST:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_text(path, *args)

    with monkeypatch.context() as m:
        m.setattr(Path, "read_text", stale)
        with pytest.raises(OSError, match="Stale file handle"):
            cleanup.prune(tmp_path, keep_last=1, keep_every=0)
    assert [step for step, _ in store.steps_present(tmp_path)] == [15, 10, 5]
    assert cleanup.prune(tmp_path, keep_last=1, keep_every=0) == [10]


def test_a_complete_directory_that_cannot_be_read_is_not_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, 5)
    aside = path.rename(tmp_path / "step_00000005.tmp-00ff")  # as a crash between two renames leaves it

    def bad(_path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as m:
        m.setattr(store, "sha256_file", bad)
        assert cleanup.sweep(tmp_path) == [] and aside.is_dir()
    assert "cannot be removed now" in caplog.text
    assert cleanup.sweep(tmp_path) == [] and names(tmp_path) == ["step_00000005"]


def test_a_commit_whose_reply_was_lost_is_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    rename, calls = os.rename, []

    def lost_reply(source: Path, target: Path) -> None:
        calls.append(Path(target).name)
        rename(source, target)
        raise OSError(errno.EIO, "the server's reply was lost")

    monkeypatch.setattr(os, "rename", lost_reply)
    path = save(tmp_path, 5)
    assert calls == ["step_00000005"] and store.verify(path)
    path = save(tmp_path, 5, {"state.json": b"again"})  # the old one is set aside first
    assert calls[2:] == ["step_00000005"] and calls[1].startswith("step_00000005.tmp-")
    assert (path / "state.json").read_bytes() == b"again" and names(tmp_path) == [path.name]


def test_a_commit_is_not_taken_for_done_because_an_older_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    save(tmp_path, 5)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, 5, {"state.json": b"again"})
    monkeypatch.undo()
    found, _ = store.newest_valid(tmp_path)
    assert found is not None and (found.path / "state.json").read_bytes() == FILES["state.json"]


def test_files_that_appear_late_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host wrote them; here one is put in place some time after the look began."""
    monkeypatch.setattr(store, "VISIBLE_SECONDS", 30.0)
    path = save(tmp_path / "a", 5)
    content = (path / "zero" / "shard_0.pt").read_bytes()
    (path / "zero" / "shard_0.pt").unlink()
    assert "is missing" in problem(path), "who does not wait is told at once"
    late = threading.Timer(0.5, (path / "zero" / "shard_0.pt").write_bytes, (content,))
    late.start()
    found, skipped = store.newest_valid(tmp_path / "a")
    assert found == store.Found(5, path) and skipped == []
    late.join()

    temporary = store.begin(tmp_path / "b", 6)
    write(temporary)
    described = store.seal(temporary, store.relative_files(temporary))
    (temporary / "rank_00000.pt").unlink()
    late = threading.Timer(0.5, (temporary / "rank_00000.pt").write_bytes, (FILES["rank_00000.pt"],))
    late.start()
    store.verify(store.commit(temporary, 6, described))
    late.join()


def test_the_checkpoint_that_latest_names_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "VISIBLE_SECONDS", 30.0)
    save(tmp_path, 5)
    hidden = save(tmp_path, 10).rename(tmp_path / "not yet visible")
    store.point(tmp_path, LATEST, 10)
    late = threading.Timer(0.5, hidden.rename, (tmp_path / "step_00000010",))
    late.start()
    found, _ = store.newest_valid(tmp_path)
    assert found is not None and found.step == 10
    late.join()


def test_a_save_begins_although_the_reply_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    mkdir, replies = Path.mkdir, [errno.EIO]

    def lost_reply(*args: Any, **more: Any) -> None:
        mkdir(*args, **more)
        if replies:
            raise OSError(replies.pop(), "the server's reply was lost")

    monkeypatch.setattr(Path, "mkdir", lost_reply)
    temporary = store.begin(tmp_path, 5)
    assert [p.name for p in tmp_path.iterdir()] == [temporary.name] and not replies
