"""A model of texts alone, and one of images alone: trained, exported with a graph, loaded, and asked for scores."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from rating_train import load
from rating_train.config.load import load_config
from rating_train.errors import UserError
from rating_train.export.options import ExportOptions
from rating_train.export.write import export
from rating_train.files import read_json_lines
from rating_train.model.architecture import read_architecture
from rating_train.model.cost import count_parameters
from rating_train.prediction.options import PredictOptions
from rating_train.prediction.run import predict
from tests.helpers.ranks import Ranks

pytestmark = pytest.mark.timeout(240)

TRAIN = {"max_steps": 1, "precision": "fp32", "background_save": False, "epochs": 1, "eval_every_steps": 0}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("inputs", [["text"], ["image"]], ids=str)
def test_a_model_of_one_input(
    inputs: list[str], demo: Path, tmp_path: Path, ranks: Ranks, tiny_config: Callable[..., Path]
) -> None:
    text = inputs == ["text"]
    ranks.train(1, tiny_config(model={"inputs": inputs}, train=TRAIN))
    run, out = tmp_path / "runs" / "run", tmp_path / "rater"
    _, table = export(
        ExportOptions(run=str(run), out=str(out), items=64, device="cpu", onnx=("fp32",) if text else ())
    )
    assert table.count("0.00e+00") and ("ONNX" in table) == text

    card = (out / "README.md").read_text()
    parameters = count_parameters(
        read_architecture(load_config(run / "config.yaml").model), 0 if text else 64
    )
    assert f"{parameters['total']:,} parameters" in card and ("Image.open" in card) != text
    assert ("its text" in card, "one image" in card) == (text, not text)

    listings = list(read_json_lines(demo / "catalogue" / "catalogue.jsonl"))[:20]
    images = None if text else [str(demo / "catalogue" / row["image_path"]) for row in listings]
    fields = listings if text else [{}] * 20
    model = load(run, device="cpu")
    scores = model.score(images, fields)
    assert load(out, device="cpu").score(images, fields) == pytest.approx(scores, abs=1e-6)
    assert len(set(scores)) > 10, "the input is read"
    if not text:
        with pytest.raises(UserError, match="this model reads an image"):
            model.score(None, {})

    source = tmp_path / "rows" / "rows.csv"  # a folder; what the model does not read need not be there
    wanted = ["id", *(["title", "description", "features", "main_category"] if text else ["image"])]
    source.parent.mkdir()
    with open(source, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(wanted)
        for row in listings:
            texts = (" ".join(v) if isinstance(v, list) else v for v in map(row.get, wanted[1:]))
            writer.writerow([row["parent_asin"], *(texts if text else [row["image_path"]])])
    given = {} if text else {"images": str(demo / "catalogue")}
    scored = tmp_path / "scores.csv"
    predict(
        PredictOptions(
            model=str(out), source=(str(source.parent),), out=str(scored), workers=0, device="cpu", **given
        )
    )
    rows = list(csv.DictReader(scored.open()))
    assert [float(row["score"]) for row in rows] == pytest.approx(scores, abs=1e-4), rows[:2]
