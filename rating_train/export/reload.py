"""Load an exported folder as a stranger does: with ``transformers`` alone, in a process that lacks this package.

    python reload.py DIR ITEMS OUT DEVICE PRECISION...

ITEMS is a folder with ``items.jsonl`` (fields of a listing in each line) and ``0.jpg``, ``1.jpg`` and so on. OUT gets
JSON: precision -> scores. The package is made impossible to import first, so that nothing of it can help. The code of
the folder is trusted because the caller has just written it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCH_ITEMS = 16


def main(folder: str, items: str, out: str, device: str, precisions: Sequence[str]) -> None:
    """Score the items in each precision (``bf16``, ``fp32``, or ``autocast``)."""
    sys.modules["rating_train"] = None  # type: ignore[assignment]  # importing it raises ImportError

    import torch
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    listings = [json.loads(line) for line in Path(items, "items.jsonl").read_text("utf-8").splitlines()]
    scores: dict[str, list[float]] = {}
    for precision in precisions:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model: Any = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval().to(device)
        scores[precision] = []
        for begin in range(0, len(listings), BATCH_ITEMS):
            some = listings[begin : begin + BATCH_ITEMS]
            pictures = [Image.open(Path(items, f"{begin + n}.jpg")) for n in range(len(some))]
            inputs = processor(images=pictures, listings=some).to(device)
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
                logits = model(**inputs).logits
            if logits.shape != (len(some), 1):
                raise ValueError(f"logits have shape {tuple(logits.shape)}, expected {(len(some), 1)}")
            scores[precision] += logits[:, 0].float().cpu().tolist()
    Path(out).write_text(json.dumps(scores), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
