"""CPU time of loading one item: read from a shard, decode, tokenize, collate. One-off; not part of the package.

    python benchmarks/loading.py DATA TOKENIZER [--items N] [--image-px S] [--rounds N]

DATA is a prepared dataset, TOKENIZER a folder or hub id. One process, as one DataLoader worker works; CPU time, so that
other work on the machine disturbs little. Cores of a GPU: 1 + items/s of the GPU x this time.
"""

from __future__ import annotations

import argparse
import statistics
import time

from rating_train.data.collate import Collator
from rating_train.data.prompt import PromptEncoder, load_tokenizer
from rating_train.data.samples.streaming_dataset import Request, SplitDataset

BATCH, VISUAL_TOKENS, TEXT_TOKENS, FIELD_CHARS = 16, 36, 176, 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("tokenizer")
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--image-px", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    dataset = SplitDataset(args.data, "train")
    prompt = PromptEncoder(load_tokenizer(args.tokenizer), VISUAL_TOKENS, TEXT_TOKENS, FIELD_CHARS)
    collator = Collator(prompt, args.image_px)
    items = min(args.items, len(dataset)) // BATCH * BATCH
    found = []
    for _ in range(args.rounds):
        started = time.process_time()
        for first in range(0, items, BATCH):
            collator(dataset.__getitems__(Request(list(range(first, first + BATCH)))))
        found.append(1000 * (time.process_time() - started) / items)
    print(
        f"{items} items at {args.image_px} px, {args.rounds} rounds: median {statistics.median(found):.2f} ms of CPU "
        f"per item ({min(found):.2f} to {max(found):.2f})"
    )


if __name__ == "__main__":
    main()
