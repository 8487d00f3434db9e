"""``rating-train cost CONFIG --sweep A.B=V,V``: what combinations of settings cost, as a table, a CSV and a plot."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.data.lengths import text_tokens_of
from rating_train.errors import UserError, one_error
from rating_train.files import atomic_write_text
from rating_train.log import text_table
from rating_train.model.accounting import SHOWN, ItemCost, item_cost
from rating_train.model.architecture import Architecture
from rating_train.model.cost import image_tokens
from rating_train.reports import plots
from rating_train.reports.cost.prompt_lengths import COVERED, Lengths, lengths_of_data
from rating_train.scoring.ces import cost_factor, efficiency
from rating_train.shards.task import with_task_of_data

CSV_FILE = "cost_sweep.csv"
PLOT_FILE = "cost_sweep.png"
MOST_SETTINGS = 1000

#: Settings that change neither the model nor what it reads could be swept, but every line would be the same.
_SWEPT = ("data.", "model.")


@dataclass(frozen=True)
class Setting:
    """One combination of the swept values.

    Attributes:
        values: key -> value, as given.
        image_px: side of the image, in pixels; 0 of a model that reads none.
        field_chars: L.
        visual_tokens: of the image.
        text_tokens: that the sequence is padded to: measured where the data are here, else as configured.
        mean_text_tokens: of the items, before padding; ``None`` where the data are not here.
        cost: of one item.
    """

    values: Mapping[str, str]
    image_px: int
    field_chars: int
    visual_tokens: int
    text_tokens: int
    mean_text_tokens: float | None
    cost: ItemCost

    def c(self, convention: str) -> float:
        """Return C at the padded length."""
        return cost_factor(self.cost.parameters, self.cost.padded[convention])


@dataclass(frozen=True)
class Sweep:
    """Several settings, and how their text lengths are known.

    Attributes:
        settings: in the order of the options, the last varying fastest.
        measured_on: items that were tokenized; 0 where text lengths are as configured.
        why_not: why nothing was measured.
    """

    settings: Sequence[Setting]
    measured_on: int
    why_not: str


def parse_sweep(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read ``A.B=V,V`` options: key -> values.

    Raises:
        UserError: all mistakes in one error.
    """
    found: dict[str, list[str]] = {}
    problems = []
    for text in texts:
        key, _, listed = text.partition("=")
        values = [v.strip() for v in listed.split(",")]
        if not listed or not all(values):
            problems.append(f"{text!r} is not KEY=VALUE,VALUE")
        elif not key.startswith(_SWEPT):
            problems.append(f"{key!r} does not change the cost of an item (a key of data or model does)")
        elif key in found:
            problems.append(f"{key!r} is given twice")
        else:
            found[key] = values
    count = 1
    for values in found.values():
        count *= len(values)
    if count > MOST_SETTINGS:
        problems.append(f"{count:,} combinations, at most {MOST_SETTINGS:,}")
    if problems:
        raise one_error(problems, where="--sweep", fix="for example --sweep data.image_px=256,384")
    return found


def run_sweep(config_file: str, overrides: list[str], swept: Mapping[str, Sequence[str]]) -> Sweep:
    """Count every combination.

    Raises:
        UserError: a combination that the configuration refuses; its values are in the message.
    """
    from rating_train.model.architecture import read_architecture

    combinations = [dict(zip(swept, values)) for values in itertools.product(*swept.values())]
    configs = []
    for values in combinations:
        given = [*overrides, *(f"{k}={v}" for k, v in values.items())]
        configs.append(with_task_of_data(load_config(config_file, given)))
    measured, why = _measure(configs)
    settings = [
        _setting(values, config, read_architecture(config.model), measured.get(config.data.field_chars))
        for values, config in zip(combinations, configs)
    ]
    items = max((len(found.tokens) for found in measured.values()), default=0)
    return Sweep(settings, items, why)


def _measure(configs: Sequence[Config]) -> tuple[dict[int, Lengths], str]:
    """Tokenize the data at every L that is swept; ({}, why) where data or tokenizer are not here."""
    first = configs[0]
    wanted = sorted({config.data.field_chars for config in configs})
    return measure_config(first, wanted)


def measure_config(config: Config, field_chars: Sequence[int]) -> tuple[dict[int, Lengths], str]:
    """Measure text lengths on the configured data: ({}, why) where data or tokenizer are not here."""
    data = Path(config.data.train_sources[0].path)
    if not data.is_dir():
        return {}, f"no dataset at {data}"
    tokenizer = config.model.tokenizer or config.model.backbone
    try:
        found = lengths_of_data(
            data,
            config.data.train_split,
            tokenizer,
            config.model.revision,
            field_chars,
            config.model.inputs,
        )
    except UserError as e:
        return {}, e.what
    return found, ""


def _setting(
    values: Mapping[str, str], config: Config, arch: Architecture, lengths: Lengths | None
) -> Setting:
    side = config.data.tiles_per_side
    visual = image_tokens(arch, config.model_px, side)
    text = text_tokens_of(config) if lengths is None else lengths.needed()
    own = [] if lengths is None else [visual + min(int(n), text) for n in lengths.tokens]
    return Setting(
        values,
        config.model_px,
        config.data.field_chars,
        visual,
        text,
        None if lengths is None else float(lengths.tokens.mean()),
        item_cost(arch, config.model_px, visual + text, own, side),
    )


def equal_ces_plcc(sweep: Sweep, convention: str, plcc: float) -> list[float]:
    """Return the PLCC at which each setting has the CES that the first one has at ``plcc``."""
    reference = plcc * efficiency(sweep.settings[0].c(convention))
    return [reference / efficiency(s.c(convention)) for s in sweep.settings]


def render_sweep(sweep: Sweep, plcc: float | None) -> str:
    """Return the table as text."""
    header, body = _table(sweep, plcc)
    if sweep.measured_on:
        note = (
            f"text tokens: measured on {sweep.measured_on:,} training items; {100 * COVERED:g} % of them fit uncut. "
            "CES at the true length counts each item at its own."
        )
    else:
        note = (
            f"text tokens: as configured, the same at every L ({sweep.why_not}: nothing could be measured)."
        )
    lines = [*text_table(header, body), note]
    if plcc is not None:
        lines.append(
            f"PLCC for equal CES: what a setting must reach to have the CES of the first at PLCC {plcc:g}."
        )
    return "\n".join(lines)


def _table(sweep: Sweep, plcc: float | None) -> tuple[list[str], list[list[str]]]:
    keys = list(sweep.settings[0].values)
    header = [*keys, "visual", "text", "mean text", "T"]
    equal = {}
    for convention, name in SHOWN.items():
        header += [f"{name} G", "C", "C true", "E"]
        if plcc is not None:
            header.append("PLCC for equal CES")
            equal[convention] = equal_ces_plcc(sweep, convention, plcc)
    body = []
    for i, s in enumerate(sweep.settings):
        mean = "-" if s.mean_text_tokens is None else f"{s.mean_text_tokens:.1f}"
        line = [*s.values.values(), f"{s.visual_tokens}", f"{s.text_tokens}", mean, f"{s.cost.padded_tokens}"]
        for convention in SHOWN:
            true = None if s.cost.true is None else cost_factor(s.cost.parameters, s.cost.true[convention])
            line += [
                f"{s.cost.padded[convention] / 1e9:.1f}",
                f"{s.c(convention):.3f}",
                "-" if true is None else f"{true:.3f}",
                f"{efficiency(s.c(convention)):.3f}",
            ]
            if plcc is not None:
                line.append(f"{equal[convention][i]:.4f}" if equal[convention][i] <= 1 else "above 1")
        body.append(line)
    return header, body


def write_sweep(sweep: Sweep, folder: Path, plcc: float | None) -> list[Path]:
    """Write the CSV and the plot; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for s in sweep.settings:
        row: dict[str, Any] = {**s.values, "visual_tokens": s.visual_tokens, "text_tokens": s.text_tokens}
        row |= {"mean_text_tokens": s.mean_text_tokens, "sequence_tokens": s.cost.padded_tokens}
        row["parameters"] = s.cost.parameters
        for convention in SHOWN:
            row[f"operations_{convention}"] = s.cost.padded[convention]
            row[f"c_{convention}"] = s.c(convention)
            row[f"e_{convention}"] = efficiency(s.c(convention))
            true = None if s.cost.true is None else s.cost.true[convention]
            row[f"operations_{convention}_true_length"] = true
        rows.append(row)
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(folder / CSV_FILE, buffer.getvalue())
    _draw(folder / PLOT_FILE, sweep, 0.7 if plcc is None else plcc)
    return [folder / CSV_FILE, folder / PLOT_FILE]


def _draw(path: Path, sweep: Sweep, plcc: float) -> None:
    """Draw the PLCC that each setting must reach over its C: what lies above its point pays for its cost."""
    figure = plots.new_figure(11.5, 4.6)
    for axes, (convention, name) in zip(figure.subplots(1, 2), SHOWN.items()):
        needed = equal_ces_plcc(sweep, convention, plcc)
        lines: dict[int, list[tuple[float, float, str]]] = {}
        for s, y in zip(sweep.settings, needed):
            lines.setdefault(s.image_px, []).append((s.c(convention), y, f"L={s.field_chars}"))
        for i, (px, points) in enumerate(sorted(lines.items())):
            points.sort()
            colour = plots.COLOURS[i % len(plots.COLOURS)]
            axes.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                "o-",
                color=colour,
                ms=5,
                lw=1.4,
                label=f"{px} px" if px else "no image",
            )
            for cx, cy, text in points:
                axes.annotate(text, (cx, cy), xytext=(4, -10), textcoords="offset points", fontsize=7)
        axes.axvline(1.0, color="0.6", ls=":", lw=1.2)
        axes.set(xlabel=f"C, {name} convention [{convention}]", ylabel="PLCC for equal CES")
        axes.grid(color="0.92")
        axes.legend(frameon=False, fontsize=8)
    first = ", ".join(f"{k}={v}" for k, v in sweep.settings[0].values.items())
    figure.suptitle(f"What a setting must reach: the CES of {first} at PLCC {plcc:g}", fontsize=11)
    plots.save(figure, path)
