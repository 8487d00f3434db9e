"""Complete runs on a GPU at each stage in bf16: train, save, kill -9, resume, evaluate."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rating_train.demo.tokenizer import IMAGE_TOKEN_ID, PAD_TOKEN_ID
from rating_train.files import read_json
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from tests.conftest import tiny_settings
from tests.gpu.conftest import DEVICE, REHEARSAL
from tests.helpers.forked import REPO
from tests.helpers.ranks import clean_environment
from tests.helpers.runs import evaluations, global_batches, losses

#: Of a loss, between a resumed and an uninterrupted run: kernels that add in no fixed order differ in the last bits.
TOLERANCE = 0.05
STEPS, SAVE_EVERY, KILL_AT = 60, 10, 25

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def full_backbone(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolVLM2-256M with random weights and the demo's tokenizer: a folder like a downloaded model's."""
    from rating_train.model.load import save_random_backbone

    shape = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]
    shape = dataclasses.replace(shape, image_token_id=IMAGE_TOKEN_ID, pad_token_id=PAD_TOKEN_ID)
    if REHEARSAL:
        shape = dataclasses.replace(
            shape,
            text=dataclasses.replace(
                shape.text, layers=1, hidden=96, heads=3, kv_heads=1, head_dim=32, mlp=128
            ),
            vision=dataclasses.replace(shape.vision, layers=1, hidden=96, heads=3, mlp=128),
        )
    folder = tmp_path_factory.mktemp("backbone") / "model"
    save_random_backbone(shape, folder, seed=17)
    for file in (demo / "model").iterdir():
        if file.name.startswith(("tokenizer", "special_tokens")):
            shutil.copy(file, folder)
    return folder


class Job:
    """``rating-train WORDS`` in a process of its own; what it prints goes to a file, so that it never waits for us."""

    def __init__(self, *words: object) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the job
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rating_train", *map(str, words)],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            cwd=REPO,
            env=clean_environment(PYTHONPATH=str(REPO)),
        )

    def finish(self, code: int = 0, seconds: float = 800) -> str:
        """Wait for the process, which must end with this code; what it printed."""
        try:
            found: int | None = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            found = None
        self._output.seek(0)
        printed = self._output.read().decode(errors="replace")
        assert found == code, f"exit code {found}\n{printed[-6000:]}"
        return printed


def configuration(name: str, folder: Path, demo: Path, stage: int, backbone: Path | None) -> Path:
    """Write a configuration of 60 steps on the demo; with ``backbone``, at 384 px."""
    settings = tiny_settings(name, folder / "runs", demo)
    settings["zero"] = {"stage": stage}
    settings["train"] = {
        "max_steps": STEPS, "save_every_steps": SAVE_EVERY, "keep_last": 1, "eval_every_steps": STEPS // 2,
        "log_every_steps": 1, "log_sample_ids": True, "precision": "bf16", "device": DEVICE,
    }  # fmt: skip
    if backbone is not None:
        data, model = settings["data"], settings["model"]
        assert isinstance(data, dict) and isinstance(model, dict)
        settings["data"] = {**data, "image_px": 384 if not REHEARSAL else 64}
        settings["model"] = {**model, "backbone": str(backbone)}
    settings["batch"] = {"global_items": 12, "micro_items": 6}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def kill_after(job: Job, run: Path) -> None:
    """kill -9 once KILL_AT steps are logged and a checkpoint is there."""
    log, pointer = run / "train.jsonl", run / "checkpoints" / "latest.json"
    deadline = time.monotonic() + 600
    while not (log.is_file() and len(log.read_text().splitlines()) >= KILL_AT and pointer.is_file()):
        if job.process.poll() is not None or time.monotonic() > deadline:
            break  # an error is shown below; a run that had ended already: raise STEPS
        time.sleep(0.01)
    job.process.kill()
    job.finish(-signal.SIGKILL)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", ["demo", "full"])
def test_a_killed_run_resumes_and_is_evaluated(
    size: str,
    stage: int,
    demo: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    measured: Callable[[str], None],
) -> None:
    backbone = request.getfixturevalue("full_backbone") if size == "full" else None
    straight = configuration("straight", tmp_path, demo, stage, backbone)
    Job("train", straight).finish()
    killed = configuration("killed", tmp_path, demo, stage, backbone)
    kill_after(Job("train", killed), tmp_path / "runs" / "killed")
    resumed = Job("train", killed, "--resume", "must").finish()
    assert "resum" in resumed
    one, other = tmp_path / "runs" / "straight", tmp_path / "runs" / "killed"

    assert global_batches(one) == global_batches(other), "the same samples in the same order"
    first, second = losses(one), losses(other)
    difference = max(abs(a - b) for a, b in zip(first, second, strict=True))
    same = "bit-equal" if first == second else "not bit-equal"
    before = "bit-equal" if first[:SAVE_EVERY] == second[:SAVE_EVERY] else "not bit-equal"
    measured(
        f"losses of {STEPS} steps {same} after kill -9 and resume, largest difference {difference:.3g}; "
        f"two runs from the start {before} over {SAVE_EVERY} steps"
    )
    assert difference <= TOLERANCE

    Job("evaluate", other, "--checkpoint", "latest").finish()
    rows = [row for row in evaluations(other) if row["step"] == STEPS]
    assert len(rows) >= 2, "the one of training, and the verb's"
    assert rows[-1]["rmse"] == pytest.approx(rows[0]["rmse"], abs=0.02)
    measured(f"evaluated by training: RMSE {rows[0]['rmse']:.5f}; by `evaluate`: {rows[-1]['rmse']:.5f}")
    shutil.rmtree(tmp_path / "runs")  # gigabytes at full size


def test_a_profile_says_how_busy_the_device_is(
    demo: Path, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    result = tmp_path / "result.json"
    config = configuration("profiled", tmp_path, demo, stage=1, backbone=None)
    Job("bench", config, "--part", "profile", "--steps", 3, "--json", result).finish()
    rows = {row["name"]: row for row in read_json(result)["rows"]}
    if REHEARSAL:
        assert any(name.startswith("operator ") for name in rows)
        return
    # Kernels of several streams overlap, so that they are busy for less than their sum.
    assert 0 < rows["the device is busy"]["ratio"] <= 1.1
    assert rows["kernels and copies"]["value"] > 100
    assert any(name.startswith("kernel ") for name in rows)
    for name, row in rows.items():
        measured(f"{name}: {row['value']:.4g} {row['unit']}")
