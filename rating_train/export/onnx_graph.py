"""ONNX graphs of the complete regressor: uint8 image and token ids in, rating out, pooling and head inside.

Legend: B items, S pixels a side, T tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rating_train.data.collate import Batch
from rating_train.errors import UserError

#: Precision -> name of its file.
FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx"}
INPUTS = ("images", "input_ids", "used_tokens")
OUTPUT = "rating"
MAX_BATCH = 4096
_LARGEST_FILE = 1 << 30  # bytes of fp32 weights above which they go beside the graph: protobuf ends at 2 GiB


def require() -> None:
    """Refuse early where the packages are missing.

    Raises:
        UserError: says what to install.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as e:
        raise UserError(f"--onnx needs the package {e.name}", fix="pip install 'rating_train[onnx]'") from e
    del onnx, onnxruntime


def write_graphs(
    folder: Path, model: nn.Module, example: Batch, precisions: Iterable[str], batch: int
) -> list[str]:
    """Write one graph for each precision.

    int8 is the fp32 graph with the weights of its linear layers in int8, per channel, and activations quantized as they
    come; embeddings, norms and the head stay in fp32. fp16 has all weights in fp16; the head computes in fp32.

    Args:
        folder: for the files.
        model: regressor in fp32 on the CPU. It is not changed.
        example: items that the graphs are traced with; repeated where ``batch`` is larger.
        precisions: of :data:`FILES`.
        batch: items that a graph takes; 0 leaves it open, up to :data:`MAX_BATCH`.

    Returns:
        names of the files.
    """
    wanted = list(precisions)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = (example.images, example.input_ids, example.used_tokens)
    arguments = tuple(tensor[torch.arange(batch or 2) % len(example)] for tensor in tensors)
    full = folder / FILES["fp32"]
    if {"fp32", "int8"} & set(wanted):
        _trace(model, arguments, batch).save(str(full))
    if "int8" in wanted:
        _quantize(full, folder / FILES["int8"])
        if "fp32" not in wanted:
            full.unlink()
    if "fp16" in wanted:
        half = copy.deepcopy(model)
        for parameter in half.parameters():  # buffers (rotary frequencies) stay in fp32
            parameter.data = parameter.data.half()
        _trace(half, arguments, batch).save(str(folder / FILES["fp16"]))
    return [FILES[name] for name in wanted]


def open_graph(path: Path, threads: int = 0) -> Callable[[Batch], Tensor]:
    """Return a function that scores batches with a graph on the CPU.

    Args:
        path: the file.
        threads: of the runtime; 0 leaves it to the runtime.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def predict(batch: Batch) -> Tensor:
        values = (batch.images, batch.input_ids, batch.used_tokens)
        (ratings,) = session.run([OUTPUT], {name: value.numpy() for name, value in zip(INPUTS, values)})
        return torch.from_numpy(ratings)

    return predict


def _trace(model: nn.Module, arguments: tuple[Tensor, ...], batch: int) -> Any:
    items = torch.export.Dim("B", min=1, max=MAX_BATCH)
    shapes = None if batch else {name: {0: items} for name in INPUTS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        return torch.onnx.export(
            model.eval(),
            arguments,
            dynamo=True,
            verbose=False,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes=shapes,
        )


def _quantize(source: Path, to: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(str(source))
    # Torch's exporter leaves shapes of weights there from before it transposed them, and the quantizer checks them.
    graph.graph.ClearField("value_info")
    quantize_dynamic(
        graph,
        str(to),
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],
        use_external_data_format=graph.ByteSize() > _LARGEST_FILE,
    )
