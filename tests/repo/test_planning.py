"""docs/planning.md says what the command computes: every row of its tables, and the output that it shows."""

from __future__ import annotations

import re

import pytest

from rating_train.config.load import load_config
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.reports.planning import (
    GIB,
    GPUS,
    LOAD_CPU_SECONDS,
    PREPARED_PER_CORE_SECOND,
    STAGES,
    Plan,
    cores_per_gpu,
    make_plan,
    render_plan,
)
from tests.repo.conftest import REPO
from tests.repo.pages import PAGES, command_lines, rows, section
from tests.repo.test_commands import parser_of

PAGE = PAGES["docs/planning.md"]
FULL, FROZEN = "full_ft_228m", "paper_frozen_228m"
ITEMS = (100_000, 1_000_000, 16_455_671)
SHOWN_GPUS = ("l4", "l40s", "a100", "h100", "b200")


def plan(recipe: str, *settings: str, items: int = 1_000_000, gpus: int = 8, gpu: str = "h100") -> Plan:
    config = load_config(REPO / "configs" / f"{recipe}.yaml", settings)
    return make_plan(config, KNOWN_ARCHITECTURES[config.model.backbone], items, gpus, gpu, mfu=0.3)


def hours(recipe: str, gpu: str, items: int) -> str:
    found = plan(recipe, items=items, gpu=gpu)
    return f"{found.seconds(found.gpu_rate[0][1]) / 3600:.2f}"


def time_rows() -> list[list[str]]:
    return [
        [
            f"{gpu} ({GPUS[gpu].bf16_tflops:g})",
            *(hours(recipe, gpu, n) for recipe in (FULL, FROZEN) for n in ITEMS),
        ]
        for gpu in SHOWN_GPUS
    ]


def memory_rows() -> list[list[str]]:
    found = []
    for recipe, name in ((FULL, "full"), (FROZEN, "frozen")):
        for gpus in (1, 8):
            counted = plan(recipe, "batch.global_items=256", gpus=gpus)
            for stage in STAGES:
                state = counted.state[stage].total
                sums = [f"{(state + size * counted.item_bytes) / GIB:.1f}" for size in (1, 8, 32)]
                found.append([f"{name}, {gpus}, stage {stage}", f"{state / GIB:.2f}", *sums])
    return found


def disk_rows() -> list[list[str]]:
    found = []
    for items in ITEMS:
        small, large = plan(FULL, items=items), plan(FULL, "data.image_px=512", items=items)
        rate = small.gpu_rate[0][1] * small.gpus * small.stored_bytes / 1e6
        core_hours = items / PREPARED_PER_CORE_SECOND / 3600
        sizes = [f"{p.stored_bytes * items / 1e9:,.0f} GB" for p in (small, large)]
        found.append([f"{items:,}", *sizes, f"{core_hours:.1f} core-hours", f"{rate:.0f} MB/s"])
    return found


def core_rows() -> list[list[str]]:
    rates = {gpu: plan(FULL, gpu=gpu).gpu_rate[0][1] for gpu in SHOWN_GPUS}
    return [[gpu, f"{rate:.0f}", str(cores_per_gpu(rate))] for gpu, rate in rates.items()]


def test_the_output_is_that_of_the_command() -> None:
    (line,) = (line for line in command_lines(PAGE) if "cost" in line)
    args = parser_of("cost").parse_args(line.split()[2:])
    config = load_config(REPO / args.config, args.set)
    found = make_plan(
        config, KNOWN_ARCHITECTURES[config.model.backbone], args.items, args.gpus, args.gpu, args.mfu
    )
    assert re.findall(r"^```\n(Training.*?)^```", PAGE, flags=re.M | re.S) == [render_plan(found)]


@pytest.mark.parametrize(
    ("title", "computed"),
    [
        ("Hours", time_rows), ("Memory of a GPU", memory_rows), ("Disk and network", disk_rows), ("Cores", core_rows),
    ],
)  # fmt: skip
def test_every_row_is_computed(title: str, computed: object) -> None:
    assert rows(section("docs/planning.md", title)) == computed()  # type: ignore[operator]


def test_the_numbers_in_the_text_are_computed() -> None:
    full, frozen = plan(FULL), plan(FROZEN)
    for found in (full, frozen):
        assert f"{found.flops / 1e9:.1f} GFLOP" in PAGE and f"{found.item_bytes / 2**20:.0f} MiB" in PAGE
    checkpoint = 14 * full.trained / 1e9
    keep = load_config(REPO / "configs" / f"{FULL}.yaml").train.keep_last
    assert (
        f"A checkpoint takes {checkpoint:.1f} GB" in PAGE and f"have {checkpoint * (keep + 2):.0f} GB" in PAGE
    )
    two = plan(FULL, "batch.global_items=2", gpus=2)
    both = [2 * (two.state[stage].total + two.item_bytes) / GIB for stage in (1, 2, 3)]
    assert "counted as above, {:.1f}, {:.1f} and {:.1f} GiB".format(*both) in PAGE
    steps = full.gpu_rate[0][1] * full.gpus / full.global_items
    traffic = 8 * full.trained * 7 / 8 / 1e9
    text = " ".join(PAGE.split())
    assert f"{traffic:.2f} GB for the full recipe on 8 GPUs. At {steps:.0f} steps per second" in text
    assert f"that is {steps * traffic:.0f} GB/s" in text and f"takes {1000 * LOAD_CPU_SECONDS:g} ms" in text
