"""Settings of what is read: the section `data` of :mod:`rating_train.config.schema`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rating_train.config.fields import setting


@dataclass(frozen=True)
class SourceConfig:
    """One of several datasets that are mixed. What each key means is said at ``data.sources``."""

    path: str = setting("", "As `data.path`.")
    weight: float = setting(1.0, "Share of the items, relative to the other sources.", low=1e-6, high=1e6)
    remote: str = setting("", "As `data.remote`.")
    cache_limit_mb: int = setting(0, "As `data.cache_limit_mb`.", low=0)


@dataclass(frozen=True)
class DataConfig:
    path: str = setting(
        "data",
        "Dataset directory made by `rating-train prepare` (it holds manifest.json); with `remote`, the directory "
        "of each node that caches it.",
    )
    sources: list[SourceConfig] = setting(
        [],
        "In place of `path`: several datasets that are mixed by weight, for example [{path: A, weight: 0.7}, {path: B, "
        "weight: 0.3}]. Each may have a `remote` and a `cache_limit_mb` of its own. An epoch has as many items as all "
        "of them together, a share of it from each; a source that is used up is shuffled anew and starts over, and "
        "what an epoch leaves of it comes first in the next.",
    )
    eval_path: str = setting(
        "", "Dataset directory to evaluate on; empty takes `path`, or the first of `sources`."
    )
    remote: str = setting(
        "",
        "Where the dataset is, if not at `path`: s3://bucket/folder, gs://bucket/folder or a directory (file:///a/b "
        "or /a/b). Shards are fetched when they are needed. Empty reads `path` itself and never deletes from it.",
    )
    cache_limit_mb: int = setting(
        0,
        "Largest size of one split in the cache, in MiB, and at least four shards; the least recently used shard "
        "is evicted. 0 keeps all. Only with `remote`: without it, the only copy would be deleted.",
        low=0,
    )
    predownload_items: int = setting(
        0,
        "Items whose shards each DataLoader worker fetches ahead; 0 takes 8 batches. Only with `remote`.",
        low=0,
    )
    features: str = setting(
        "",
        "Directory made by `rating-train features CONFIG --out DIR`: training and its evaluations read the visual "
        "tokens of `path` from there in place of its images, and run the decoder alone. Needs `model.freeze: [vision, "
        "connector]`; refused where the data or the weights are not those that it was made from.",
    )
    verify: Literal["first_read", "size"] = setting(
        "first_read",
        "Check the hash of each shard before the first step that reads it (about 3.5 GB/s from memory; the ranks "
        "share the work), or only its size at start-up. Downloads are always hashed.",
    )
    train_split: str = setting("train", "Split to train on.")
    eval_split: str = setting("val", "Split to evaluate on while training.")
    image_px: int = setting(
        384,
        "Side of the square image fed to the model, in pixels. Stored images of another size are resized.",
        low=16,
        high=4096,
    )
    tiling_px: int = setting(
        0,
        "Dynamic tiling of stock SmolVLM (2048 there, with `image_px` 512): the longest side to which an image is "
        "resized before it is cut into squares of `image_px`, which come before the complete image. A multiple of "
        "`image_px`; needs `prepare --keep-aspect`. 0: one square for each image.",
        low=0,
        high=16384,
    )
    field_chars: int = setting(
        100,
        "L: characters kept of each text field (of stars: title, description, features, main category).",
        low=1,
        high=100_000,
    )
    text_tokens: int = setting(
        176,
        "Text tokens per item, template and padding included; visual tokens come on top. Fields that do not "
        "fit are cut from the longest one, and counted.",
        low=8,
        high=8192,
    )
    shuffle: bool = setting(True, "Shuffle the training split anew in every epoch.")
    shuffle_seed: int = setting(
        9176, "Seed of the shuffle. Changing it changes the order of the samples.", low=0, high=2**31
    )
    shuffle_block_samples: int = setting(
        262144,
        "Samples within which shards are mixed. A larger block mixes better, a smaller one keeps fewer shards open.",
        low=1,
    )
    num_canonical_nodes: int = setting(
        1,
        "Parts into which the shuffled shards are divided. Fixed, so that the order does not depend on the number of "
        "nodes.",
        low=1,
        high=1024,
    )
    workers: int = setting(
        4,
        "DataLoader workers per rank; 0 loads in the training process. The order of samples is the same.",
        low=0,
        high=256,
    )
    prefetch_batches: int = setting(4, "Batches that each DataLoader worker keeps ready.", low=1, high=1024)

    @property
    def tiles_per_side(self) -> int:
        """Most tiles beside or above one another; 0 without tiling."""
        return self.tiling_px // self.image_px

    @property
    def train_sources(self) -> list[SourceConfig]:
        """The datasets to train on: `sources`, or the one of `path`."""
        one = SourceConfig(self.path, 1.0, self.remote, self.cache_limit_mb)
        return self.sources or [one]

    @property
    def is_remote(self) -> bool:
        """Whether any dataset to train on is fetched from elsewhere."""
        return any(source.remote for source in self.train_sources)

    @property
    def eval_source(self) -> SourceConfig:
        """The dataset to evaluate on."""
        return SourceConfig(self.eval_path) if self.eval_path else self.train_sources[0]
