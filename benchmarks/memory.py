"""Compare the predicted memory of a rank with what a process takes on a CPU. One-off; not part of the package.

    python benchmarks/memory.py [--stage 1] [--precision bf16] [--micro 1] [--small] [--freeze vision connector]
        [--checkpointing]

Takes two steps with random weights on one rank, and prints the growth of the process's resident memory: its peak in
the second step (VmHWM, reset before it) over what was resident before the model was made. The process also holds what
a GPU does not: freed pages that the C library keeps, threads' buffers of matrix products, DeepSpeed's own objects.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import socket
from pathlib import Path


def resident(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="two layers of each tower")
    parser.add_argument("--freeze", nargs="*", default=[])
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()

    from rating_train.bench.synthetic import noise_batch, reduced_architecture
    from rating_train.config.load import config_from_dict
    from rating_train.config.resolve import plan_batch
    from rating_train.engine.engine import build_engine
    from rating_train.engine.memory import predict_memory
    from rating_train.model.architecture import KNOWN_ARCHITECTURES
    from rating_train.model.regressor import build_regressor
    from rating_train.training import setup

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({**{k: str(v) for k, v in job.items()}, "MASTER_ADDR": "127.0.0.1"})
    architecture = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]
    if options.small:
        architecture = reduced_architecture({"layers": 2, "vocab": 8192}, {"layers": 2})
    config = config_from_dict(
        {
            "model": {
                "weights": "random",
                "freeze": options.freeze,
                "gradient_checkpointing": options.checkpointing,
            },
            "zero": {"stage": options.stage},
            "train": {"precision": options.precision, "device": "cpu"},
            "batch": {"global_items": options.micro},
        }
    )
    _, device = setup.join_job(wanted="cpu")
    import deepspeed  # noqa: F401  # its modules are no memory of the model

    predicted = predict_memory(config, architecture, 1)
    gc.collect()
    before = resident("VmRSS")
    model = build_regressor(config.model, architecture, 384, 1, seed=1)
    engine = build_engine(model, config, plan_batch(options.micro, 0, 1), device)
    tokens = model.visual_tokens + config.data.text_tokens
    batch = noise_batch(options.micro, tokens, 384, architecture.text.vocab)
    engine.step(batch, 0, 10)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    engine.step(batch, 1, 10)
    grown = resident("VmHWM") - before
    print(
        f"stage {options.stage}, {options.precision}, {options.micro} items{', small' if options.small else ''}"
        f"{', frozen: ' + ' '.join(options.freeze) if options.freeze else ''}"
        f"{', checkpointing' if options.checkpointing else ''}: "
        f"resident memory grew by {grown / 2**30:.3f} GiB, predicted {predicted.peak / 2**30:.3f} GiB, "
        f"predicted / measured {predicted.peak / grown:.3f}"
    )


if __name__ == "__main__":
    main()
