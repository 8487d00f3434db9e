"""Make a small random SmolVLM with a tokenizer trained on the training text of a dataset. Not part of the package.

    python benchmarks/small_model.py DATA OUT

For trying a dataset on a CPU; `rating-train demo` does the same for its own catalogue.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from streaming import LocalDataset

from rating_train.config.task import task_of
from rating_train.demo.model import demo_architecture
from rating_train.demo.tokenizer import make_tokenizer
from rating_train.model.load import save_random_backbone
from rating_train.shards.manifest import read_manifest

VOCABULARY = 6144


def main() -> None:
    data, out = sys.argv[1], Path(sys.argv[2])
    dataset = LocalDataset(local=data, split="train")
    fields = task_of(read_manifest(data)).field_names
    texts = (" ".join(row[k] for k in fields) for row in (dataset[i] for i in range(len(dataset))))
    vocabulary = make_tokenizer(texts, out, VOCABULARY)
    demo = demo_architecture(vocabulary)
    architecture = replace(
        demo,
        text=replace(demo.text, hidden=128, heads=4, kv_heads=2, mlp=384),
        vision=replace(demo.vision, hidden=96, layers=3, heads=3, mlp=256, patch=16, image_size=128),
        head_hidden=64,
    )
    save_random_backbone(architecture, out, seed=17)


if __name__ == "__main__":
    main()
