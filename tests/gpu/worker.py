"""Run by test_engine.py in a process of its own: one engine on one device, looked at while it takes steps.

python tests/gpu/worker.py --stage 1 --device cuda --size full --out row.json
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from rating_train.bench.timeline import WAITS

MICRO, ACCUMULATION = 4, 2
STEPS = 4  # before anything is looked at: optimizer state, the allocator, the order in which stage 3 gathers
FUSED_ATTENTION = re.compile("flash|fmha|cudnn|efficient", re.IGNORECASE)
PACKAGES = ("rating_train", "deepspeed", "transformers", "torch")


def architecture(size: str) -> Any:
    """SmolVLM2-256M, or two narrow layers of each tower."""
    from rating_train.bench.synthetic import reduced_architecture
    from rating_train.model.architecture import KNOWN_ARCHITECTURES

    if size == "full":
        return KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]
    narrow = {"layers": 2, "hidden": 192, "mlp": 512}
    text = {**narrow, "heads": 6, "kv_heads": 2, "head_dim": 32, "vocab": 4096}
    return reduced_architecture(text, {**narrow, "heads": 3})


def attention_calls(engine: Any, batch: Any) -> list[dict[str, Any]]:
    """The distinct arguments that scaled_dot_product_attention gets in a forward pass without gradients."""
    functional, seen = torch.nn.functional, []
    original = functional.scaled_dot_product_attention

    def recording(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        call = {
            "mask": attn_mask is not None,
            "causal": bool(options.get("is_causal", False)),
            "gqa": bool(options.get("enable_gqa", False)),
            "dtypes": sorted({str(t.dtype) for t in (query, key, value)}),
            "heads": [query.shape[1], key.shape[1]],
        }
        if call not in seen:
            seen.append(call)
        return original(query, key, value, attn_mask, **options)

    functional.scaled_dot_product_attention = recording
    try:
        engine.predict(batch.split(MICRO)[0])
    finally:
        functional.scaled_dot_product_attention = original
    return seen


def synchronisations(step: Any) -> dict[str, int]:
    """The lines of Python under which torch waits for the device during a step (torch's own check of each wait)."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found: Counter[str] = Counter()
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found[f"{_short(warning.filename)}:{warning.lineno}"] += 1
    return dict(found)


def _short(path: str) -> str:
    starts = [path.rfind(f"/{package}/") for package in PACKAGES]
    return path[max(starts) + 1 :]


def profiled(step: Any) -> dict[str, Any]:
    """Waits, copies to the host and kernels of attention in a step, as the profiler saw them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        step()
    waits: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in prof.events():
        if event.name in WAITS or "DtoH" in event.name:
            waits[event.name] += 1
        if event.device_type == DeviceType.CUDA:
            kernels[event.name] += 1
    attention = {name[:120]: n for name, n in kernels.items() if FUSED_ATTENTION.search(name)}
    # The profiler itself waits for the device once, when it ends.
    return {"waits": dict(waits), "attention": attention, "kernels": sum(kernels.values())}


def main() -> None:
    """Build the engine, take steps, look, and write what was seen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--size", choices=("small", "full"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    from rating_train.bench.synthetic import noise_batch
    from rating_train.config.load import config_from_dict
    from rating_train.config.resolve import plan_batch
    from rating_train.engine.engine import build_engine
    from rating_train.engine.memory import predict_memory
    from rating_train.model.regressor import build_regressor
    from rating_train.training import setup

    cuda = options.device == "cuda"
    shape = architecture(options.size)
    config = config_from_dict(
        {
            "data": {"image_px": 384 if options.size == "full" else 128},
            "model": {"weights": "random"},
            "zero": {"stage": options.stage},
            "train": {"precision": "bf16", "device": options.device},
            "batch": {"global_items": MICRO * ACCUMULATION, "micro_items": MICRO},
        }
    )
    world, device = setup.join_job(wanted=options.device)
    plan = plan_batch(config.batch.global_items, MICRO, world.size)
    px = config.data.image_px
    model = build_regressor(config.model, shape, px, 4, seed=17)
    engine = build_engine(model, config, plan, device)
    tokens = model.visual_tokens + config.data.text_tokens
    batch = noise_batch(plan.rank_items, tokens, px, shape.text.vocab, seed=5, padding=20)
    if cuda:
        batch = batch.pin_memory()
    losses = [engine.step(batch, step, 100) for step in range(STEPS)]
    row: dict[str, Any] = {
        "losses": torch.stack(losses).tolist(),
        "norm": engine.grad_norm,
        "skipped": engine.read_skipped(wait=True),
        "attention_calls": attention_calls(engine, batch),
        "scores": engine.predict(batch).tolist(),
        "devices": sorted({p.device.type for p in model.parameters()}),
        "predicted": predict_memory(config, shape, 1).peak,
    }
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        engine.step(batch, STEPS, 100)
        torch.cuda.synchronize()
        row["allocated"] = torch.cuda.max_memory_allocated()
        row["reserved"] = torch.cuda.max_memory_reserved()
        row["synchronisations"] = synchronisations(lambda: engine.step(batch, STEPS + 1, 100))
        row["profile"] = profiled(lambda: engine.step(batch, STEPS + 2, 100))
        row["skipped"] += engine.read_skipped(wait=True)
    options.out.write_text(json.dumps(row, indent=1))


if __name__ == "__main__":
    from rating_train.cli import leave

    main()
    leave(0)
