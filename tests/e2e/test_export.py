"""`rating-train export`: the folder works without the package, scores as the checkpoint does, or is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from rating_train import load, register_auto_classes
from rating_train.errors import UserError
from rating_train.export import write
from rating_train.export.options import ExportOptions
from rating_train.export.write import export
from rating_train.files import read_json, read_json_lines
from rating_train.prediction.options import PredictOptions
from rating_train.prediction.output import read_output
from rating_train.prediction.run import predict
from rating_train.scoring.analysis import analyse
from rating_train.scoring.predictions import read_predictions
from tests.conftest import REPO
from tests.helpers.cli import rating_train

pytestmark = pytest.mark.timeout(240)


class Exported(NamedTuple):
    """An exported folder, and the table of how its scores compare with the checkpoint's."""

    folder: Path
    table: str


@pytest.fixture(scope="module")
def exported(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("export") / "rater-1.0"
    _, table = export(ExportOptions(run=str(trained_run), out=str(out), items=64, device="cpu"))
    return Exported(out, table)


@pytest.fixture(scope="module")
def listings(demo: Path) -> list[dict[str, Any]]:
    return list(read_json_lines(demo / "catalogue" / "catalogue.jsonl"))[:20]


def test_the_scores_are_those_of_the_checkpoint(exported: Exported) -> None:
    checkpoint, same, fp32 = exported.table.splitlines()[2:]
    assert checkpoint.split()[:2] == ["checkpoint", "bf16"] and "PLCC" in exported.table.splitlines()[0]
    assert (
        same.split()[:4] == ["AutoModel", "bf16", "checkpoint", "0.00e+00"] and same.split()[-1] == "+0.00000"
    )
    assert fp32.split()[:2] == ["AutoModel", "fp32"] and 0 < float(fp32.split()[3]) < 0.25


def test_evaluate_gives_it_the_scores_of_its_checkpoint(
    exported: Exported, trained_run: Path, demo: Path, tmp_path: Path
) -> None:
    before = sorted(exported.folder.rglob("*"))
    words = ("--data", demo / "data", "--out", tmp_path, "--no-ridge", "--resamples", 50)
    done = rating_train("evaluate", exported.folder, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(exported.folder.rglob("*")) == before, "nothing is written into an export"
    name = "val_step_00000006"
    mine, own = (read_predictions(f / "predictions" / f"{name}.jsonl") for f in (tmp_path, trained_run))
    assert {r.id: r.score for r in mine} == {r.id: r.score for r in own}
    found = read_json(tmp_path / "evaluations" / f"{name}.json")
    assert found["seen"] == {"items": len(own), "by_id": 0, "by_group": 0, "unknown": "", "warning": ""}
    assert (tmp_path / "eval.jsonl").is_file()


STRANGER = """
import json, sys
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoProcessor

sys.modules["rating_train"] = None
folder, images, listings = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert (config.num_labels, config.problem_type) == (1, "regression")
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=[Image.open(path) for path in images], listings=listings)
assert inputs["pixel_values"].dtype == torch.uint8 and len(inputs["attention_mask"]) == len(images)
with torch.no_grad():
    ratings = model.eval()(**inputs).logits
one = processor(images[0], listings[0])
with torch.no_grad():
    assert abs(model(**one).logits[0, 0] - ratings[0, 0]) < 1e-5
model.train()  # it can be fine-tuned further
output = model(**inputs, labels=torch.full((len(images),), 3.0))
output.loss.backward()
assert output.loss > 0 and all(p.grad is not None for n, p in model.named_parameters() if "head" in n)
try:
    model(pixel_values=inputs["pixel_values"].float(), input_ids=inputs["input_ids"])
except ValueError as e:
    assert "uint8" in str(e)
else:
    raise AssertionError("scaled pixels are refused")
print(json.dumps({"shape": list(ratings.shape), "ratings": ratings[:, 0].tolist()}))
"""


def test_a_process_without_the_package_gets_the_same_ratings(
    exported: Exported, demo: Path, listings: list[dict[str, Any]], tmp_path: Path
) -> None:
    images = [str(demo / "catalogue" / row["image_path"]) for row in listings]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(exported.folder), json.dumps(images), json.dumps(listings)],
        env={
            **environment,
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shape"] == [20, 1]
    fp32 = load(exported.folder, device="cpu", settings=["train.precision=fp32"])
    assert found["ratings"] == pytest.approx(fp32.score(images, listings), abs=1e-5)


def test_with_the_package_no_code_of_the_folder_runs(
    exported: Exported, demo: Path, listings: list[dict[str, Any]]
) -> None:
    from transformers import AutoModel, AutoProcessor

    register_auto_classes()
    register_auto_classes()  # a second time is no error
    model = AutoModel.from_pretrained(exported.folder).eval()
    assert type(model).__module__ == "rating_train.export.hub.modeling_rating"
    processor = AutoProcessor.from_pretrained(exported.folder)
    images = [Image.open(demo / "catalogue" / row["image_path"]) for row in listings]
    with torch.no_grad():
        ratings = model(**processor(images=images, listings=listings)).logits[:, 0].tolist()
    fp32 = load(exported.folder, device="cpu", settings=["train.precision=fp32"])
    assert ratings == pytest.approx(fp32.score(images, listings), abs=1e-5)


@pytest.mark.usefixtures("alone")
def test_load_and_predict_take_the_folder(
    exported: Exported, trained_run: Path, demo: Path, listings: list[dict[str, Any]], tmp_path: Path
) -> None:
    images = [demo / "catalogue" / row["image_path"] for row in listings]
    expected = load(trained_run, device="cpu").score(images, listings)
    assert load(exported.folder, device="cpu").score(images, listings) == expected
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listings))
    options = PredictOptions(
        model=str(exported.folder), out=str(tmp_path / "out.csv"), source=(str(tmp_path / "some.jsonl"),),
        images=str(demo / "catalogue"), workers=0, batch_items=32,
    )  # fmt: skip
    predict(options)
    assert [row.score for row in read_output(tmp_path / "out.csv")] == pytest.approx(expected, abs=1e-5)


def test_the_model_card(exported: Exported, trained_run: Path) -> None:
    text = (exported.folder / "README.md").read_text("utf-8")
    _, head, body = text.split("---\n", 2)
    card = yaml.safe_load(head)
    (result,) = card["model-index"][0]["results"]
    (row,) = read_json_lines(trained_run / "eval.jsonl")
    found = {metric["type"]: metric for metric in result["metrics"]}
    for kind, name in (("pearsonr", "plcc"), ("spearmanr", "srcc"), ("rmse", "rmse"), ("mae", "mae")):
        assert found[kind]["value"] == pytest.approx(row[name], abs=1e-5)
        assert found[kind]["args"]["low"] <= found[kind]["value"] <= found[kind]["args"]["high"]
    rows = read_predictions(next((trained_run / "predictions").glob("val_step_*.jsonl")))
    expected = analyse(rows)["metrics"]
    for kind, name in (("pearsonr", "plcc"), ("rmse", "rmse")):
        ends = [found[kind]["args"][end] for end in ("low", "high")]
        assert ends == pytest.approx(expected[name]["interval_95"], abs=1e-5), (
            "groups resampled, as evaluate does"
        )
    fingerprint = read_json(trained_run / "provenance.json")["data_fingerprint"]
    assert result["dataset"]["revision"] == fingerprint and fingerprint in body
    for part in ("mac_linear", "flop_attention", "CES", "## Limits", "## Licence", "peak learning rates"):
        assert part in body
    assert "$" not in body and exported.table in body


def test_nothing_of_the_machine_is_in_the_folder(exported: Exported, trained_run: Path) -> None:
    private = (str(trained_run.parents[1]), str(REPO), str(exported.folder.parent))
    for path in exported.folder.rglob("*"):
        if path.suffix in (".json", ".yaml", ".md", ".py"):
            text = path.read_text("utf-8")
            assert not [p for p in private if p in text], path.name
    modes = {path.name: path.stat().st_mode & 0o777 for path in exported.folder.iterdir()}
    assert len(set(modes.values())) == 1, f"one may not be less readable than another: {modes}"


def with_one_weight_changed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["regressor.head.outer.bias"] += 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_module(folder: Path) -> None:
    (folder / "modeling_rating.py").write_text("raise RuntimeError('torn')\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_one_weight_changed, r"AutoModel in bf16 differs by up to 0\.0\d+ .*nothing was written"),
        (without_a_module, r"cannot be loaded again \(RuntimeError: torn\); nothing was written"),
    ],
)
def test_a_spoiled_export_is_not_left_there(
    spoil: Callable[[Path], None],
    message: str,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = write._write_files

    def write_and_spoil(folder: Path, *more: Any) -> None:
        own(folder, *more)
        spoil(folder)

    monkeypatch.setattr(write, "_write_files", write_and_spoil)
    options = ExportOptions(run=str(trained_run), out=str(tmp_path / "model"), items=64, device="cpu")
    with pytest.raises(UserError, match=message):
        export(options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(exported: Exported, trained_run: Path, tmp_path: Path) -> None:
    run, out = str(trained_run), str(tmp_path / "new")
    for options, said in (
        (ExportOptions(run=run, out=str(exported.folder)), "the folder exists already"),
        (ExportOptions(run=str(exported.folder), out=out), "an exported folder already"),
        (ExportOptions(run=run, out=out, items=10), "`items` is 10, expected at least 64"),
        (ExportOptions(run=run, out=out, checkpoint="77"), "there is no checkpoint 77"),
        (ExportOptions(run=run, out=out, data=str(tmp_path)), "not a dataset"),
    ):
        with pytest.raises(UserError, match=said):
            export(options)
    assert not Path(out).exists()


def test_damaged_weights_are_named(exported: Exported, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(exported.folder, copy)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"the weights cannot be read .*model\.safetensors"):
        load(copy, device="cpu")
    config = read_json(copy / "config.json")
    del config["architecture"]["text"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the architecture is not complete .*config\.json"):
        load(copy, device="cpu")


# ---- ONNX


@pytest.fixture(scope="module")
def with_graphs(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("onnx") / "rater"
    kinds = ("fp32", "fp16", "int8")
    _, table = export(ExportOptions(run=str(trained_run), out=str(out), items=64, device="cpu", onnx=kinds))
    return Exported(out, table)


def test_graphs_score_as_pytorch_does(with_graphs: Exported) -> None:
    fp32, fp16, int8 = [line.split() for line in with_graphs.table.splitlines()[-3:]]
    assert [row[1] for row in (fp32, fp16, int8)] == ["fp32", "fp16", "int8"]
    assert float(fp32[4]) < 1e-4 and float(fp16[4]) < 0.1, "stars, against PyTorch in fp32"
    assert 0 < float(int8[4]) < 0.5, "quantized, and still the same model"
    assert all(row[-1][0] in "+-" for row in (fp32, fp16, int8)), "the change of PLCC is shown"
    sizes = {path.name: path.stat().st_size for path in (with_graphs.folder / "onnx").iterdir()}
    assert sorted(sizes) == ["model.onnx", "model_fp16.onnx", "model_int8.onnx"]
    assert (
        sizes["model_fp16.onnx"] < 0.8 * sizes["model.onnx"]
        and sizes["model_int8.onnx"] < 0.8 * sizes["model.onnx"]
    )
    card = (with_graphs.folder / "README.md").read_text("utf-8")
    assert "`onnx/model_int8.onnx`" in card and with_graphs.table in card


def test_a_graph_takes_any_number_of_items_and_needs_no_torch(
    with_graphs: Exported, demo: Path, listings: list[dict[str, Any]]
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(with_graphs.folder / "onnx" / "model.onnx"))
    model = load(with_graphs.folder, device="cpu", settings=["train.precision=fp32"])
    images = [demo / "catalogue" / row["image_path"] for row in listings]
    expected = model.score(images, listings)
    samples = model._samples(images, listings, 0)  # type: ignore[arg-type]
    batch = model._scorer.collator(samples)
    for count in (1, 5, 20):
        inputs = {
            "images": batch.images[:count].numpy(),
            "input_ids": batch.input_ids[:count].numpy(),
            "used_tokens": batch.used_tokens[:count].numpy(),
        }
        (ratings,) = session.run(["rating"], inputs)
        assert ratings.shape == (count,) and ratings.tolist() == pytest.approx(expected[:count], abs=1e-4)
