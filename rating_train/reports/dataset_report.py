"""An HTML report of a dataset: one page with its pictures embedded, and the pictures as PNGs beside it.

Reads at most :data:`MAX_ITEMS` items, a random sample that is the same each time, so that 16 million items
take as long as 20 thousand. Reads shards with :mod:`rating_train.shards.mds_read`, without torch, so that a
login node can draw the page (unless text is to be counted in tokens).
"""

from __future__ import annotations

import io
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from rating_train.config.task import PAPER, Task, task_of
from rating_train.files import atomic_write_text
from rating_train.reports import plots
from rating_train.reports.dataset_labels import caption, rating_edges, target_label
from rating_train.reports.page.parts import Section, card, figure, page, section, table
from rating_train.reports.page.render import Table, data_uri
from rating_train.scoring.slices import NO_CATEGORY
from rating_train.shards.manifest import read_manifest
from rating_train.shards.mds_read import iter_sampled

PAGE_FILE = "index.html"
MAX_ITEMS = 20_000
SHEET_ROWS, SHEET_COLUMNS = 6, 8
MAX_CATEGORIES = 25
FIELD_CHARS = (50, 100, 200)  # L of the recipe and its two ablations

#: (file, title, what to look for) of each picture, in page order.
PICTURES = (
    ("ratings.png", "Ratings", "Ratings that crowd together leave little to correlate with."),
    ("rating_counts.png", "Number of ratings", "A mean of few ratings is a noisy target."),
    ("categories.png", "Categories", "The largest, by the listings' own main category."),
    (
        "text_lengths.png",
        "Text lengths",
        "What stands to the right of an L is cut. A curve that starts high has empty fields.",
    ),
    ("images.png", "Images", "As stored. Training resizes what is not of its own size."),
    ("contact_sheet.png", "Random items", "With their ratings and numbers of ratings."),
)


@dataclass
class Sampled:
    """Columns of the sampled items; ``pictures`` holds the samples of the contact sheet."""

    task: Task = PAPER
    ratings: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    categories: Counter[str] = field(default_factory=Counter)
    chars: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=lambda: {chars: [] for chars in FIELD_CHARS})
    image_bytes: list[int] = field(default_factory=list)
    image_px: Counter[tuple[int, int]] = field(default_factory=Counter)
    pictures: list[dict[str, Any]] = field(default_factory=list)


def make_data_report(data: Path, out: Path | None = None, tokenizer: str = "") -> Path:
    """Write the report of a dataset directory.

    Args:
        data: dataset directory.
        out: folder for the page; default ``DATA.report`` beside it (nothing is written into a dataset).
        tokenizer: folder or hub id; "" leaves out lengths in tokens.

    Returns:
        The path of ``index.html``.

    Raises:
        UserError: not a dataset, a damaged shard, or no such tokenizer.
    """
    manifest = read_manifest(data)
    folder = out or data.resolve().with_name(f"{data.resolve().name}.report")
    count = _token_counter(tokenizer) if tokenizer else None
    sampled = collect(
        iter_sampled([data / split for split in manifest["splits"]], MAX_ITEMS), count, task_of(manifest)
    )
    folder.mkdir(parents=True, exist_ok=True)
    _draw_ratings(folder / PICTURES[0][0], sampled)
    if sampled.task.weight:
        _draw_counts(folder / PICTURES[1][0], sampled)
    _draw_categories(folder / PICTURES[2][0], sampled)
    if sampled.chars:
        _draw_texts(folder / PICTURES[3][0], sampled)
    if sampled.image_bytes:
        _draw_images(folder / PICTURES[4][0], sampled)
        _draw_sheet(folder / PICTURES[5][0], sampled.pictures, sampled.task)
    page = folder / PAGE_FILE
    atomic_write_text(page, _page(data, manifest, sampled, folder))
    return page


def collect(
    samples: Iterator[dict[str, Any]], count_tokens: Callable[[str], int] | None, task: Task = PAPER
) -> Sampled:
    """Collect the columns of samples; the contact sheet is a uniform choice of them (reservoir sampling)."""
    from PIL import Image

    found, choice = Sampled(task, chars={name: [] for name in task.field_names}), random.Random(1)
    places = SHEET_ROWS * SHEET_COLUMNS
    for i, sample in enumerate(samples):
        if math.isfinite(sample["rating"]):
            found.ratings.append(sample["rating"])
            found.counts.append(sample.get("rating_count", 0))
        found.categories[sample.get("main_category", "") or NO_CATEGORY] += 1
        if "image" in sample:
            found.image_bytes.append(len(sample["image"]))
            with Image.open(io.BytesIO(sample["image"])) as image:  # reads the header only
                found.image_px[image.size] += 1
        for name in found.chars:
            found.chars[name].append(len(sample[name]))
        if count_tokens is not None:
            for chars, tokens in found.tokens.items():
                tokens.append(sum(count_tokens(sample[name][:chars]) for name in found.chars))
        if i < places:
            found.pictures.append(sample)
        elif (place := choice.randrange(i + 1)) < places:
            found.pictures[place] = sample
    return found


def _token_counter(tokenizer: str) -> Callable[[str], int]:
    from rating_train.data.prompt import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)


# --- pictures ------------------------------------------------------------------------------------------


def _draw_ratings(path: Path, found: Sampled) -> None:
    figure = plots.new_figure(8.5, 3.6)
    axes = figure.subplots()
    ratings = np.asarray(found.ratings)
    edges, label = rating_edges(found.task.target, found.ratings), target_label(found.task.target)
    axes.hist(ratings, bins=edges, color=plots.COLOURS[0], alpha=0.85)
    mean = float(ratings.mean())
    axes.axvline(mean, color=plots.COLOURS[1], ls="--", lw=1.4, label=f"mean {mean:.3f}")
    axes.set(xlabel=label, ylabel="items", xlim=(edges[0], edges[-1]))
    _legend(axes)
    plots.save(figure, path)


def _draw_counts(path: Path, found: Sampled) -> None:
    figure = plots.new_figure(8.5, 3.6)
    left, right = figure.subplots(1, 2)
    counts = np.maximum(np.asarray(found.counts), 1)
    edges = np.geomspace(counts.min(), max(counts.max(), counts.min() + 1) * 1.01, 40)
    left.hist(counts, bins=edges.tolist(), color=plots.COLOURS[0], alpha=0.85)
    middle = float(np.median(counts))
    left.axvline(middle, color=plots.COLOURS[1], ls="--", lw=1.4, label=f"median {middle:.0f}")
    what = "ratings of an item" if found.task.counted else "weight of an item"
    left.set(xscale="log", xlabel=what, ylabel="items")
    _legend(left)
    # Is popularity correlated with the rating? If so, a model may learn one in place of the other.
    columns = np.geomspace(edges[0], edges[-1], 30).tolist()
    right.hist2d(
        counts,
        found.ratings,
        bins=[columns, rating_edges(found.task.target, found.ratings)],
        cmin=1,
        cmap="Blues",
        norm="log",
    )
    if found.task.target == PAPER.target:
        right.set(ylim=(min(found.ratings) - 0.15, 5.05))
    right.set(xscale="log", xlabel=left.get_xlabel(), ylabel=target_label(found.task.target))
    plots.save(figure, path)


def _draw_categories(path: Path, found: Sampled) -> None:
    largest = found.categories.most_common(MAX_CATEGORIES)
    figure = plots.new_figure(8.5, 1.1 + 0.26 * len(largest))
    axes = figure.subplots()
    names = [f"{plots.plain(name[:45])} ({n:,})" for name, n in largest]
    axes.barh(range(len(largest)), [n for _, n in largest], color=plots.COLOURS[0], alpha=0.85, height=0.7)
    axes.set_yticks(range(len(largest)), names, fontsize=9)
    axes.set(ylim=(len(largest) - 0.4, -0.6), xlabel="items")
    if len(found.categories) > len(largest):
        axes.set_title(f"the {len(largest)} largest of {len(found.categories):,}", loc="left", fontsize=10)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    plots.save(figure, path)


def _draw_texts(path: Path, found: Sampled) -> None:
    tokens = {chars: values for chars, values in found.tokens.items() if values}
    figure = plots.new_figure(11.5 if tokens else 8.5, 4.0)
    panels = figure.subplots(1, 2 if tokens else 1, squeeze=False)[0]
    for colour, (name, values) in zip(plots.COLOURS, found.chars.items()):
        _cumulative(panels[0], values, f"{name.replace('_', ' ')}", colour)
    for chars in FIELD_CHARS:
        panels[0].axvline(chars, color="0.5", ls=":", lw=1.2)
        panels[0].text(
            chars,
            101,
            f"L={chars}" if chars == FIELD_CHARS[0] else f"{chars}",
            ha="center",
            va="bottom",
            fontsize=8,
            color="0.3",
        )
    panels[0].set(xscale="symlog", xlabel="characters of a field", ylabel="items at most so long (%)")
    panels[0].set_xlim(0, max([1000, *(max(v) for v in found.chars.values())]))
    for colour, (chars, values) in zip(plots.COLOURS[4:] + plots.COLOURS[:4], tokens.items()):
        _cumulative(panels[1], values, f"L={chars}, longest {max(values)}", colour)
    if tokens:
        panels[1].set(xlabel="tokens of all fields, cut at L (without the template)")
    for axes in panels:
        axes.set_ylim(0, 101)
        axes.grid(color="0.92")
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    plots.save(figure, path)


def _cumulative(axes: Any, values: Sequence[int], label: str, colour: str) -> None:
    """Plot the share of items up to each length, in percent."""
    ordered = np.sort(np.asarray(values))
    share = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
    axes.step(np.r_[0, ordered], np.r_[0, share], where="post", color=colour, lw=1.6, label=label)


def _draw_images(path: Path, found: Sampled) -> None:
    figure = plots.new_figure(8.5, 3.2)
    axes = figure.subplots()
    kilobytes = np.asarray(found.image_bytes) / 1000
    axes.hist(kilobytes, bins=60, color=plots.COLOURS[0], alpha=0.85)
    mean = float(kilobytes.mean())
    axes.axvline(mean, color=plots.COLOURS[1], ls="--", lw=1.4, label=f"mean {mean:.1f} kB")
    sizes = ", ".join(f"{w} x {h} px ({n:,})" for (w, h), n in found.image_px.most_common(5))
    axes.set_title(f"stored sizes: {sizes}", loc="left", fontsize=10)
    axes.set(xlabel="stored JPEG (kB)", ylabel="items")
    _legend(axes)
    plots.save(figure, path)


def _draw_sheet(path: Path, samples: Sequence[Mapping[str, Any]], task: Task) -> None:
    from PIL import Image

    figure = plots.new_figure(14, 12.6)
    for axes in figure.subplots(SHEET_ROWS, SHEET_COLUMNS).flat:
        axes.axis("off")
    for axes, sample in zip(figure.axes, samples):
        with Image.open(io.BytesIO(sample["image"])) as image:
            axes.imshow(np.asarray(image.convert("RGB").resize((192, 192))))
        title = " ".join(sample.get("title", sample["id"]).split())
        shown = title if len(title) <= 26 else f"{title[:25]}…"
        axes.set_title(
            f"{caption(sample, task)}\n{plots.plain(shown)}",
            fontsize=7,
        )
    plots.save(figure, path)


def _legend(axes: Any) -> None:
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)


# --- the page ------------------------------------------------------------------------------------------


def _page(data: Path, manifest: Mapping[str, Any], found: Sampled, folder: Path) -> str:
    """Return the HTML text, with the pictures embedded."""
    splits = manifest["splits"]
    items = sum(entry["items"] for entry in splits.values())
    seen = len(found.ratings)
    shown = "all of them" if seen == items else f"{seen:,} of them, chosen at random"
    ratings, target = np.asarray(found.ratings), found.task.target
    top = [
        card("items", f"{items:,}", f"{len(splits)} splits"),
        card(f"mean {target.name}", f"{ratings.mean():.3f}", f"deviation {ratings.std():.3f}{target.suffix}"),
        *(
            [card("ratings of an item", f"{np.median(found.counts):,.0f}", "median")]
            if found.task.weight
            else []
        ),
        card("categories", f"{len(found.categories):,}", "in the pictures"),
        card("shards", f"{sum(e['bytes'] for e in splits.values()) / 1e6:,.1f} MB"),
    ]
    lines = [
        [split, e["items"], e["shards"], round(e["bytes"] / 1e6, 1), e["rating_mean"], e["rating_std"]]
        for split, e in splits.items()
    ]
    head = ("split", "items", "shards", "MB", f"mean {target.name}", "its deviation")
    sections = [
        section("splits", "Splits", tables=[table(Table(head, lines, 3))]),
        _dropped(manifest),
        section("text", "Text fields", tables=[table(_cut_table(found))]),
    ]
    for file, title, note in PICTURES:
        if not (folder / file).exists():
            continue  # of what the task does not have
        uri = data_uri((folder / file).read_bytes(), "image/png")
        drawing = Markup('<img alt="{}" src="{}">').format(title, uri)
        identity = file.partition(".")[0]
        sections.append(section(identity, title, note, columns=1, figures=[figure("", drawing)]))
    fingerprint = manifest.get("fingerprint", "")
    lead = f"Pictures show {shown}. Fingerprint {fingerprint}"
    return page(data.resolve().name, lead, top, sections)


def _dropped(manifest: Mapping[str, Any]) -> Section:
    dropped, read = manifest.get("dropped") or {}, manifest.get("read")
    rows = [[k, n, 100 * n / read if read else None] for k, n in Counter(dropped).most_common()]
    of = f"{read:,}" if isinstance(read, int) else read
    intro = f"{sum(dropped.values()):,} of {of} records, by reason; each is named in quarantine.jsonl."
    tables = [table(Table(("reason", "records", "share (%)"), rows, 2))] if rows else []
    return section("dropped", "Dropped", intro, tables=tables)


def _cut_table(found: Sampled) -> Table:
    """Return a table of each field: the share that is empty, its lengths, and the share cut at each L."""
    rows: list[list[Any]] = []
    for name, values in found.chars.items():
        lengths = np.asarray(values)
        cut = [100 * float(np.mean(lengths > chars)) for chars in FIELD_CHARS]
        middle, high = (round(float(np.quantile(lengths, q))) for q in (0.5, 0.95))
        rows.append([name.replace("_", " "), 100 * float(np.mean(lengths == 0)), middle, high, *cut])
    cuts = (f"cut at L={chars} (%)" for chars in FIELD_CHARS)
    return Table(("field", "empty (%)", "median chars", "95 % at most", *cuts), rows, 1)
