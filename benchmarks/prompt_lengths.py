"""Tabulate how many text tokens the items of a dataset need at each L. Not part of the package.

    python benchmarks/prompt_lengths.py DATA TOKENIZER [L=TEXT_TOKENS ...]

DATA is a dataset directory; TOKENIZER a folder or hub id. Each L=TEXT_TOKENS is looked at for the share of items that
fit uncut; by default those of the 228M configurations.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from rating_train.data.prompt import load_tokenizer
from rating_train.reports.cost.prompt_lengths import measure_lengths
from rating_train.shards.manifest import read_manifest
from rating_train.shards.mds_read import iter_texts

CONFIGURED = ("50=112", "100=176", "200=304")
QUANTILES = (0.5, 0.95, 0.99, 0.999, 1.0)


def main() -> None:
    """Print a Markdown table."""
    data, tokenizer = Path(sys.argv[1]), load_tokenizer(sys.argv[2])
    wanted = {int(a): int(b) for a, b in (text.split("=") for text in sys.argv[3:] or CONFIGURED)}
    items = itertools.chain.from_iterable(iter_texts(data / split) for split in read_manifest(data)["splits"])
    found = measure_lengths(items, tokenizer, sorted(wanted))
    print("| L | items | mean | median | 95 % | 99 % | 99.9 % | longest | configured | fit uncut |")
    print("| --- " * 10 + "|")
    for chars, lengths in found.items():
        cells = [f"{chars}", f"{len(lengths.tokens):,}", f"{lengths.tokens.mean():.1f}"]
        cells += [f"{lengths.needed(q)}" for q in QUANTILES]
        cells += [f"{wanted[chars]}", f"{100 * lengths.covered(wanted[chars]):.2f} %"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
