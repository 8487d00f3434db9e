"""How much memory the batches of a configuration need, for checks before a job starts. Imports no torch."""

from __future__ import annotations

from rating_train.config.schema import Config, SourceConfig
from rating_train.data.features.identity import features_of

_PAGE_BYTES = 4096
#: Beside the prefetched batches: the one in use, and the one that follows it while the loop still holds the first.
_BATCHES_IN_USE = 2


def shared_memory_need(config: Config, ranks: int, ranks_per_node: int, visual_tokens: int = 256) -> int:
    """Bytes that the blocks of all DataLoader workers of one node occupy at most (see ``shared_blocks``).

    The training loader's workers keep their prefetched batches while an evaluation runs, so both loaders count.

    Args:
        config: the configuration.
        ranks: number of ranks of the job.
        ranks_per_node: number of those on one node.
        visual_tokens: image tokens of an item. The default is an upper bound for images of up to 1024 pixels; they
            make up less than one percent of a batch.
    """
    rank_items = -(-config.batch.global_items // ranks)
    evaluation_items = config.eval.micro_items or config.batch.micro_items or rank_items
    tokens = config.data.text_tokens + visual_tokens
    training = _loader_bytes(config, config.data.train_sources[0], rank_items, tokens)
    evaluation = _loader_bytes(config, config.data.eval_source, evaluation_items, tokens)
    return (training + evaluation) * ranks_per_node


def _loader_bytes(config: Config, source: SourceConfig, items: int, tokens: int) -> int:
    data = config.data
    if data.workers == 0:
        return 0  # batches are made in the training process
    blocks = data.workers * worker_batches(data.workers, data.prefetch_batches)
    flags = _PAGE_BYTES  # of the blocks, see shared_blocks
    return blocks * batch_bytes(items, image_bytes(config, source), tokens) + flags


def worker_batches(workers: int, prefetch: int) -> int:
    """Batches of one worker that are in shared memory at a time: those that are ready, and its share of those in use.

    Args:
        workers: number of DataLoader workers of a rank.
        prefetch: batches that each keeps ready.
    """
    return prefetch + -(-_BATCHES_IN_USE // workers)


def image_bytes(config: Config, source: SourceConfig) -> int:
    """Return the bytes of an item's images in a batch, or of the visual tokens that stand for them.

    Raises:
        UserError: `data.features` cannot be read.
    """
    if found := features_of(config.data, source):
        return found.item_bytes
    return 3 * config.model_px**2 * (config.data.tiles_per_side**2 + 1)


def batch_bytes(items: int, images: int, tokens: int) -> int:
    """Bytes of a batch's tensors, each rounded up to pages (see ``collate.Batch``).

    Args:
        items: B.
        images: bytes of an item's images.
        tokens: T, text and visual tokens of an item.
    """
    item = {
        "images": images,
        "input_ids": 8 * tokens,
        "used_tokens": 8,
        "ratings": 4,
        "rating_counts": 4,
        "id_hashes": 8,
    }
    return sum(_pages(items * size) for size in item.values())


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES
