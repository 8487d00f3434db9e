"""What a newcomer mistypes and a hostile user tries: one line that names the place and the fix, and exit code 2.

Each case is a real process. None may show a traceback, none may hang, none may leave half of something behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from rating_train.resilience.run_lock import RunLock
from tests.conftest import small_file_system, tiny_settings
from tests.faults.ledger import stop_process
from tests.helpers.forked import REPO, zygote
from tests.helpers.ranks import Ranks, clean_environment, wait_for_step

pytestmark = pytest.mark.timeout(240)

#: Nothing here may take longer: on an idle machine a case takes about half a second. On a machine with other work,
#: RATING_TRAIN_PATIENCE multiplies it.
HANG_SECONDS = 30 * float(os.environ.get("RATING_TRAIN_PATIENCE", "1"))
#: For what is not forked, but imports everything anew.
REAL_START_SECONDS = 2 * HANG_SECONDS


class Place:
    """The folder of one case: a small demo, a trained run, and means to damage copies of them."""

    def __init__(self, folder: Path, demo: Path, trained: Path) -> None:
        self.folder, self.demo, self.trained = folder, demo, trained
        self.env: dict[str, str] = {}
        self.stack = contextlib.ExitStack()

    def file(self, name: str, content: str | bytes = "") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def config(self, **sections: Any) -> Path:
        """The smallest configuration, with other values."""
        settings: dict[str, Any] = tiny_settings("run", self.folder / "runs", self.demo)
        for name, values in sections.items():
            settings[name] = {**settings.get(name, {}), **values} if isinstance(values, dict) else values
        return self.file("run.yaml", yaml.safe_dump(settings))

    def copy(self, name: str) -> Path:
        """A copy of the demo's ``data`` or ``model``, or of the trained run."""
        source = self.trained if name == "run" else self.demo / name
        return Path(shutil.copytree(source, self.folder / f"copy-of-{name}"))

    def config_of_copy(self, name: str) -> Path:
        key, section = {"data": ("path", "data"), "model": ("backbone", "model")}[name]
        return self.config(**{section: {key: str(self.folder / f"copy-of-{name}")}})

    def run(self, *arguments: object) -> tuple[int, str]:
        """The exit code and all output of the command; fails where it does not end."""
        env = clean_environment(**{"TMPDIR": str(self.folder), "RATING_TRAIN_LOG": "WARNING", **self.env})
        process = zygote().start(["-m", "rating_train", *arguments], env, cwd=REPO)
        try:
            output, _ = process.communicate(timeout=HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            pytest.fail(f"no end after {HANG_SECONDS:g} s (times RATING_TRAIN_PATIENCE): {output[-3000:]}")
        assert process.returncode is not None
        return process.returncode, output


@pytest.fixture
def place(tmp_path: Path, demo: Path, trained_run: Path) -> Iterator[Place]:
    found = Place(tmp_path, demo, trained_run)
    with found.stack:
        yield found


@dataclass(frozen=True)
class Case:
    """``command`` makes the mess and returns the arguments; ``says``: parts of the one line of the error."""

    name: str
    command: Callable[[Place], list[object]]
    says: tuple[str, ...]
    names: tuple[str, ...] = field(default=("fix:", "expected:"))  # one of them is in the line, too


def given(*words: object) -> Callable[[Place], list[object]]:
    """These words, of which functions are called with the place."""
    return lambda place: [word(place) if callable(word) else word for word in words]


CONFIG, HERE, TRAINED = Place.config, (lambda place: place.folder), (lambda place: place.trained)
DATA = lambda place: place.demo / "data"  # noqa: E731
NONE = lambda place: place.folder / "none.yaml"  # noqa: E731


def train(**sections: Any) -> Callable[[Place], list[object]]:
    return lambda place: ["train", place.config(**sections)]


def yaml_file(content: str | bytes, verb: str = "train") -> Callable[[Place], list[object]]:
    return lambda place: [verb, place.file("bad.yaml", content)]


def damaged(what: str, file: str, change: Callable[[Path], object]) -> Callable[[Place], list[object]]:
    """Train on a copy of the demo's data or model in which one file was changed."""

    def command(place: Place) -> list[object]:
        change(next(place.copy(what).glob(file)))
        return ["train", place.config_of_copy(what)]

    return command


def damaged_run(
    file: str, change: Callable[[Path], object], *arguments: str
) -> Callable[[Place], list[object]]:
    def command(place: Place) -> list[object]:
        run = place.copy("run")
        change(next(run.glob(file)))
        verb, *options = arguments
        return [verb, run, *options]

    return command


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rubbish(path: Path) -> None:
    path.write_bytes(b"\x00\xff\xfe rubbish {[\n")


def as_list(path: Path) -> None:
    path.write_text("[1, 2]")


def folder_of_rubbish(place: Place) -> Path:
    for name in ("config.yaml", "train.jsonl", "manifest.txt", "photo.jpg"):
        place.file(f"rubbish/{name}", b"\x00\xff rubbish")
    return place.folder / "rubbish"


def data_of_rubbish(place: Place) -> list[object]:
    return ["train", place.config(data={"path": str(folder_of_rubbish(place))})]


def locked(place: Place) -> list[object]:
    config = place.config()
    place.stack.enter_context(RunLock(place.folder / "runs" / "run"))
    return ["train", config]


def read_only(place: Place) -> list[object]:
    disk = place.stack.enter_context(small_file_system(place.folder / "disk", megabytes=1))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=30)
    return ["train", place.config(runs_dir=str(disk))]


def full_disk(place: Place) -> list[object]:
    disk = place.stack.enter_context(small_file_system(place.folder / "disk", megabytes=1))
    with contextlib.suppress(OSError), open(disk / "filler", "wb") as f:
        f.write(bytes(1 << 21))
    return ["train", place.config(runs_dir=str(disk), train={"max_steps": 1, "background_save": False})]


def only_starting(place: Place) -> list[object]:
    place.file("young/LOCK", json.dumps({"pid": 1, "host": "elsewhere", "nonce": "a"}))
    return ["evaluate", place.folder / "young"]


def launcher(**variables: str) -> Callable[[Place], list[object]]:
    def command(place: Place) -> list[object]:
        place.env = variables
        return ["train", place.config()]

    return command


def circle(place: Place) -> list[object]:
    place.file("b.yaml", "base: a.yaml\n")
    return ["train", place.file("a.yaml", "base: b.yaml\n")]


def without_checkpoints(place: Place) -> list[object]:
    shutil.rmtree(place.copy("run") / "checkpoints")
    return ["evaluate", place.folder / "copy-of-run"]


def linked_in_a_circle(place: Place) -> list[object]:
    os.symlink("loop", place.folder / "loop")
    return ["train", place.folder / "loop"]


ONE_RANK = {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
NO_RANKS = {"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"}
BOMB = "a: &a [1]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq")
)
DEEP = "a: " + "[" * 3000 + "]" * 3000

CASES = [
    # --- the configuration
    Case("no file", given("train", NONE), ("configuration file not found", "none.yaml")),
    Case("a directory", given("train", HERE), ("the configuration is a directory",)),
    Case("a device", given("train", "/dev/null"), ("not a regular file", "/dev/null")),
    Case("a link to itself", linked_in_a_circle, ("the configuration cannot be read", "loop")),
    Case("binary", yaml_file(b"\x00\xff\xfe"), ("not valid YAML", "bad.yaml"), ("where:",)),
    Case("empty", yaml_file(""), ("the configuration is empty", "bad.yaml")),
    Case("a list", yaml_file("- 1\n"), ("a configuration is a mapping", "bad.yaml")),
    Case(
        "aliases without end", yaml_file("zero: &i {extra: *i}\n"), ("not valid YAML", "alias"), ("where:",)
    ),
    Case("an alias bomb", yaml_file(BOMB), ("not valid YAML", "alias"), ("where:",)),
    Case("3,000 levels", yaml_file(DEEP), ("not valid YAML", "levels"), ("where:",)),
    Case("a huge file", yaml_file("# " + "x" * (1 << 20)), ("not valid YAML", "characters"), ("where:",)),
    Case("a key twice", yaml_file("name: a\nname: b\n"), ("not valid YAML", "name"), ("where:",)),
    Case(
        "a tag", yaml_file("name: !!python/object/apply:os.system [id]\n"), ("not valid YAML",), ("where:",)
    ),
    Case("a misspelt key", yaml_file("modle: {}\n"), ("unknown key `modle`", "did you mean `model`?")),
    Case("a wrong type", yaml_file("data: {workers: many}\n"), ("`data.workers` is 'many'",)),
    Case("not a number", yaml_file("train: {epochs: .nan}\n"), ("`train.epochs`",)),
    Case(
        "out of bounds",
        yaml_file("data: {workers: -1, image_px: 9999999}\n"),
        ("data.workers", "data.image_px"),
    ),
    Case("a name that leaves the folder", yaml_file("name: ../x\n"), ("`name` is '../x'",)),
    Case("a name with a line break", yaml_file('name: "a\\nb"\n'), ("`name` is",)),
    Case("a circle of bases", circle, ("`base:` files form a circle",), ("where:",)),
    Case("no such base", yaml_file("base: none.yaml\n"), ("configuration file not found", "none.yaml")),
    Case("--set without =", given("train", CONFIG, "--set", "x"), ("--set 'x' is not of the form",)),
    Case("--set of no key", given("train", CONFIG, "--set", "a.b=1"), ("unknown key `a`",)),
    Case("cost: no file", yaml_file("modle: {}\n", "cost"), ("did you mean `model`?",)),
    # --- the data
    Case("no data", train(data={"path": "/no/data"}), ("dataset directory not found", "/no/data")),
    Case(
        "data is a file", train(data={"path": "README.md"}), ("the dataset is not a directory", "README.md")
    ),
    Case(
        "data is a device", train(data={"path": "/dev/null"}), ("the dataset is not a directory", "/dev/null")
    ),
    Case(
        "data is anything",
        data_of_rubbish,
        ("not a dataset", "rubbish"),
    ),
    Case(
        "no manifest", damaged("data", "manifest.json", Path.unlink), ("has no manifest.json", "copy-of-data")
    ),
    Case(
        "rubbish manifest",
        damaged("data", "manifest.json", rubbish),
        ("not valid JSON", "manifest.json"),
        ("where:",),
    ),
    Case("a list as manifest", damaged("data", "manifest.json", as_list), ("version None", "copy-of-data")),
    Case(
        "no index", damaged("data", "train/index.json", Path.unlink), ("index is missing", "train/index.json")
    ),
    Case(
        "another index", damaged("data", "train/index.json", as_list), ("index is not the one", "index.json")
    ),
    Case("no shard", damaged("data", "train/*.mds", Path.unlink), ("damaged shards", "is missing")),
    Case("a cut shard", damaged("data", "train/*.mds", truncate), ("damaged shards", "bytes instead of")),
    Case("no such split", train(data={"train_split": "trian"}), ("no split data.train_split=trian",)),
    # --- the model
    Case("no backbone", train(model={"backbone": "/no/model"}), ("backbone", "/no/model")),
    Case("an unknown id", train(model={"backbone": "no/such-model"}), ("backbone", "no/such-model")),
    Case(
        "rubbish config.json",
        damaged("model", "config.json", rubbish),
        ("not valid JSON", "config.json"),
        ("where:",),
    ),
    Case("a list as config.json", damaged("model", "config.json", as_list), ("config.json",), ("where:",)),
    Case("no weights", damaged("model", "model.safetensors", Path.unlink), ("backbone could not be loaded",)),
    Case("cut weights", damaged("model", "model.safetensors", truncate), ("backbone could not be loaded",)),
    Case("rubbish tokenizer", damaged("model", "tokenizer.json", rubbish), ("tokenizer", "copy-of-model")),
    Case("image side", train(data={"image_px": 70}), ("70 pixels", "data.image_px")),
    Case("text too short", train(data={"text_tokens": 8}), ("data.text_tokens",)),
    Case(
        "one of two sources",
        lambda place: [
            "train",
            place.config(data={"path": "", "sources": [{"path": str(DATA(place))}, {"path": "/no"}]}),
        ],
        ("dataset directory not found", "/no"),
    ),
    Case("sources and a path", train(data={"sources": [{"path": "a"}]}), ("`data.path` and `data.sources`",)),
    # --- the loss
    Case("no such loss", train(loss={"kind": "no_module:f"}), ("no module 'no_module'", "loss.kind")),
    Case("a loss that is none", train(loss={"kind": "math:pi"}), ("not a function", "loss.kind")),
    # --- sizes
    Case("micro-batch", train(batch={"micro_items": 5}), ("micro-batches of 5", "batch.micro_items")),
    Case(
        "a batch of a million",
        train(batch={"global_items": 10**6}),
        ("larger than the split", "batch.global_items"),
    ),
    # --- the run directory
    Case("runs in a device", train(runs_dir="/dev/null"), ("/dev/null is not a directory", "runs_dir")),
    Case("runs in a file", train(runs_dir="README.md"), ("README.md is not a directory", "runs_dir")),
    Case("a read-only disk", read_only, ("cannot be written", "disk")),
    Case("a full disk", full_disk, ("disk",)),
    Case("a run in use", locked, ("another job is using this run", "LOCK")),
    Case(
        "--resume banana",
        given("train", CONFIG, "--resume", "banana"),
        ("no checkpoint directory 'banana'",),
    ),
    Case("--resume must", given("train", CONFIG, "--resume", "must"), ("no checkpoint",)),
    Case(
        "--resume rubbish",
        given("train", CONFIG, "--resume", folder_of_rubbish),
        ("rubbish",),
        ("where:",),
    ),
    # --- the launcher
    Case("half a launcher", launcher(RANK="0", WORLD_SIZE="2"), ("did not set LOCAL_RANK",)),
    Case(
        "a rank that is none",
        launcher(RANK="x", **ONE_RANK),
        ("RANK='x'",),
    ),
    Case(
        "no ranks",
        launcher(**NO_RANKS),
        ("not a valid rank layout",),
    ),
    # --- the other verbs
    Case("status: no run", given("status", "/no/run"), ("no such folder", "/no/run")),
    Case("status: a file", given("status", "README.md"), ("it is a file", "README.md")),
    Case("status: rubbish", given("status", folder_of_rubbish), ("not a run directory", "rubbish")),
    Case("status: a dataset", given("status", DATA), ("not a run directory", "data")),
    Case("evaluate: no run", given("evaluate", "/no/run"), ("no such run directory", "/no/run")),
    Case(
        "evaluate: a file",
        given("evaluate", "README.md"),
        ("a file is not a run directory", "README.md"),
    ),
    Case("evaluate: a dataset", given("evaluate", DATA), ("not a run directory", "data")),
    Case("evaluate: starting", only_starting, ("it is starting", "young")),
    Case("evaluate: nothing saved", without_checkpoints, ("no checkpoint best", "copy-of-run")),
    Case(
        "evaluate: banana",
        given("evaluate", TRAINED, "--checkpoint", "banana"),
        ("'banana' names no checkpoint",),
    ),
    Case("evaluate: no such split", given("evaluate", TRAINED, "--split", "x"), ("no split 'x'",)),
    Case(
        "evaluate: a damaged checkpoint",
        damaged_run("checkpoints/step_*/state.json", rubbish, "evaluate"),
        ("cannot be trusted", "state.json"),
        ("where:",),
    ),
    Case(
        "evaluate: damaged settings",
        damaged_run("config.yaml", rubbish, "evaluate"),
        ("config.yaml",),
        ("where:",),
    ),
    Case("report: no run", given("report", "/no/run"), ("no such folder", "/no/run")),
    Case("report: rubbish", given("report", folder_of_rubbish), ("rubbish",), ("where:",)),
    Case(
        "report: damaged rows", damaged_run("train.jsonl", rubbish, "report"), ("train.jsonl",), ("where:",)
    ),
    Case("verify: no data", given("verify", "/no/data"), ("dataset directory not found", "/no/data")),
    Case("verify: a file", given("verify", "README.md"), ("the dataset is not a directory", "README.md")),
    Case("verify: rubbish", given("verify", folder_of_rubbish), ("not a dataset", "rubbish")),
    Case("verify: a run", given("verify", TRAINED), ("not a dataset", "trained")),
    Case("compare: no run", given("compare", TRAINED, "/no/run"), ("/no/run",)),
    Case(
        "prepare: no source",
        given("prepare", "--source", "/no/source.csv", "--images", HERE, "--out", HERE),
        ("/no/source.csv",),
    ),
    Case(
        "demo: over a file",
        given("demo", "--out", lambda place: place.file("mine", "precious")),
        ("mine",),
        ("where:",),
    ),
    Case("demo: over a folder", given("demo", "--out", folder_of_rubbish), ("not empty", "rubbish")),
    Case(
        "submit: no file",
        given("submit", NONE, "--dry-run"),
        ("configuration file not found",),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_one_line_names_the_place_and_the_fix(case: Case, place: Place) -> None:
    code, output = place.run(*case.command(place))
    assert "Traceback" not in output, output[-3000:]
    assert code == 2, output[-3000:]
    errors = [line for line in output.splitlines() if ": error: " in line]
    assert len(errors) == 1, output[-3000:]
    for part in case.says:
        assert part in errors[0], errors[0]
    assert any(word in errors[0] for word in case.names), errors[0]


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40 and len({case.name for case in CASES}) == len(CASES)


def test_what_is_refused_leaves_no_run_behind(place: Place) -> None:
    for config in (place.config(data={"path": "/no/data"}), place.config(batch={"global_items": 10**6})):
        assert place.run("train", config)[0] == 2
        assert not (place.folder / "runs").exists()


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(place: Place) -> None:
    """As `rating-train status RUN | head -0` does it."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(place.folder / "stderr", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "rating_train", "status", str(place.trained), "--quick"],
            stdout=writer, stderr=errors, cwd=REPO, env=clean_environment(),
        )  # fmt: skip
        os.close(writer)
        assert process.wait(timeout=REAL_START_SECONDS) == 128 + signal.SIGPIPE
    assert (place.folder / "stderr").read_text() == ""


def test_a_rank_that_is_stopped_shows_in_the_status(place: Place, ranks: Ranks) -> None:
    import psutil

    run = place.folder / "runs" / "run"
    config = place.config(train={"epochs": 4000, "log_every_steps": 1, "eval_every_steps": 0})
    process = ranks.start(2, "-m", "rating_train", "train", config, torchrun=False)
    wait_for_step(run, 3, process)
    last = sorted(psutil.Process(process.pid).children(), key=lambda p: p.pid)[-1]
    stop_process(last)
    deadline = time.monotonic() + 100
    while "STALLED      no step for" not in (text := place.run("status", run, "--quick")[1]):
        assert time.monotonic() < deadline, text
        time.sleep(1)
    assert "owner        alive" in text and " left" not in text
    last.send_signal(signal.SIGCONT)
    while "STALLED" in (text := place.run("status", run, "--quick")[1]):
        assert time.monotonic() < deadline + 60, text
        time.sleep(1)
    assert " left" in text
