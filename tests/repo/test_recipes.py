"""The README's first two recipes, followed line by line in a fresh clone. The third is in tests/slurm.

What is substituted, since there is no GPU, no network and no catalogue of the reader's own:

- ``.venv`` is a link to the environment of these tests: nothing is installed;
- the catalogue is the demo's 300 listings under the file names of the page, with its images;
- recipe 1 trains one epoch instead of four;
- recipe 2: ``configs/full_ft_228m.yaml`` names the demo's tiny model with small images and texts, trains one epoch, and
  the ranks are 2 CPU processes. All other settings are those of the file.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.ranks import script_env
from tests.repo.conftest import REPO, copy_checkout
from tests.repo.pages import PAGES, RECIPES, command_lines, section

pytestmark = pytest.mark.timeout(600)

SECONDS = 500  # about 40 s each on two idle cores


@pytest.fixture
def clone(tmp_path: Path, demo: Path) -> Path:
    """A clone of this repository, with what is not committed yet, and the images of the demo's catalogue."""
    folder = tmp_path / "rating_train"
    cloned = subprocess.run(["git", "clone", "-q", str(REPO), str(folder)], capture_output=True, text=True)
    if cloned.returncode != 0:
        pytest.skip(f"this is no repository that can be cloned: {cloned.stderr.strip()}")
    copy_checkout(folder)
    (folder / "images").symlink_to(demo / "catalogue" / "images")
    environment = Path(sys.prefix)
    if not (environment / "bin" / "activate").is_file():
        pytest.skip("these tests run in no virtual environment, so there is none to activate")
    (folder / ".venv").symlink_to(environment)
    return folder


def listings(demo: Path) -> list[dict[str, object]]:
    text = (demo / "catalogue" / "catalogue.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def follow(lines: list[str], folder: Path) -> str:
    """Run the lines in one shell, as a reader pastes them; all that they print."""
    asked = "python -c 'import rating_train; print(rating_train.__file__)'"
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join([asked, *lines])],
        cwd=folder,
        env=script_env(PYTHONPATH=str(folder), OMP_NUM_THREADS="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.startswith(f"{folder}{os.sep}"), "the clone's own code runs"
    return done.stdout


def test_recipe_1_my_csv_on_this_machine(clone: Path, demo: Path) -> None:
    """The CSV has the columns that the page names; images are found by the items' ids; the small model is trained."""
    write_csv(clone / "products.csv", listings(demo))
    path = clone / "configs" / "small_cpu.yaml"
    path.write_text(path.read_text().replace("epochs: 4", "epochs: 1"))
    output = follow(command_lines(section("README.md", RECIPES[0])), clone)
    assert "prepared data/small_128" in output and (clone / "models/small/model.safetensors").is_file()
    assert "2 ranks on cpu" in output and re.search(r"^.*PLCC +-?0\.\d+", output, flags=re.M)
    assert (clone / "runs/small_cpu/report").is_dir()


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """The listings under the column names of the page."""
    named = PAGES["README.md"].split("The columns are ")[1].split("(a path below")[0]
    columns = [c for c in re.findall(r"`(\w+)`", named) if c != "image"]
    names = {"id": "parent_asin", "rating": "average_rating", "rating_count": "rating_number"}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for listing in rows:
            row = {c: listing.get(names.get(c, c), "") for c in columns}
            writer.writerow({c: " ".join(v) if isinstance(v, list) else v for c, v in row.items()})


def test_recipe_2_one_machine_with_gpus(clone: Path, demo: Path) -> None:
    (clone / "meta_All_Beauty.jsonl.gz").write_bytes(
        gzip.compress((demo / "catalogue" / "catalogue.jsonl").read_bytes())
    )
    path = clone / "configs" / "full_ft_228m.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["model"] |= {"backbone": str(demo / "model"), "head_hidden": 16}
    settings["data"] |= {"image_px": 64, "text_tokens": 96, "workers": 1}
    settings["train"] |= {"epochs": 1, "log_every_steps": 1}
    path.write_text(yaml.safe_dump(settings))
    output = follow(["source .venv/bin/activate", *command_lines(section("README.md", RECIPES[1]))], clone)
    assert "prepared data/amazon2023" in output and "2 ranks on cpu" in output
    assert "flop_attention" in output and (clone / "runs/full_ft_228m/report").is_dir()
    rows = (clone / "runs/full_ft_228m/eval.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["source"] == "evaluate"
    shards = json.loads((clone / "data/amazon2023/manifest.json").read_text())
    assert shards["image_size_px"] == 384, "as the recipe prepares them"
