"""docs/reproduce.md: each row names a configuration that is there, and its numbers are those that are counted."""

from __future__ import annotations

import re
import shlex

import pytest

from rating_train.config.load import load_config
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.prepare.options import PrepareOptions
from rating_train.reports.cost_report import CostReport, measure_cost
from tests.repo.conftest import REPO
from tests.repo.pages import rows, section
from tests.repo.test_commands import parser_of

PAGE = "docs/reproduce.md"
EVERYTHING = 16_455_671
ITEMS = {"paper_items_16m": EVERYTHING, "paper_adamw_8bit": EVERYTHING, "paper_items_100k": 100_000}
EPOCHS = 5
GPUS, FLOPS_OF_A_GPU = 4, 100e12
ROWS = {found[1]: row for row in rows(section(PAGE, "Rows")) if (found := re.search(r"(\w+)\.yaml", row[2]))}


def cost_of(name: str) -> tuple[CostReport, float]:
    """The cost of an item, and the FLOPs of all training."""
    config = load_config(REPO / "configs" / "ablations" / f"{name}.yaml")
    assert set(config.model.freeze) == {"vision", "connector"} and config.train.epochs == EPOCHS
    counted = measure_cost(
        KNOWN_ARCHITECTURES[config.model.backbone], config.data.image_px, config.data.text_tokens, None,
        config.data.tiles_per_side,
    )  # fmt: skip
    part = counted.forward.by_part("flop_attention")
    item = part["vision"] + part["connector"] + 3 * (part["decoder"] + part["head"])
    return counted, EPOCHS * ITEMS.get(name, 1_000_000) * item


def test_every_configuration_of_a_row_is_there() -> None:
    assert set(ROWS) == {path.stem for path in (REPO / "configs" / "ablations").glob("paper_*.yaml")}


@pytest.mark.parametrize("name", ROWS)
def test_the_costs_are_counted(name: str) -> None:
    counted, flops = cost_of(name)
    totals = counted.forward.totals()
    assert ROWS[name][3:8] == [
        f"{counted.visual_tokens} + {counted.text_tokens}",
        f"{counted.parameters['total'] / 1e6:.1f} M",
        f"{totals['mac_linear'] / 1e9:.1f}",
        f"{totals['flop_attention'] / 1e9:.1f}",
        f"{flops / 1e18:.2f} EFLOP",
    ]


def test_the_hours_follow_from_the_count() -> None:
    said = re.findall(r"(\d+\.\d) hours", section(PAGE, "Rows"))
    names = ("paper_items_1m", "paper_items_16m", "paper_500m_512")
    assert said == [f"{cost_of(name)[1] / (GPUS * FLOPS_OF_A_GPU) / 3600:.1f}" for name in names]


def test_the_data_that_is_prepared_is_what_the_rows_train_on() -> None:
    made = {}
    for line in section(PAGE, "Data").split("```")[1].strip().splitlines():
        verb, *words = shlex.split(line)[1:]
        args = parser_of(verb).parse_args(words)
        made[args.out] = args
        rules = PrepareOptions(source=("a",), images="b", out=args.out, sample=args.sample).rules
        assert not rules.problems()
    for name in ROWS:
        data = load_config(REPO / "configs" / "ablations" / f"{name}.yaml").data
        assert made[data.path].image_size_px == (data.tiling_px or data.image_px)
        assert made[data.path].keep_aspect == bool(data.tiling_px)
        items = ITEMS.get(name, 1_000_000)
        assert made[data.path].sample == (0 if items == EVERYTHING else items)
