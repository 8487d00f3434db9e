"""A captured state shares no memory with the engine and keeps the types of its containers."""

from __future__ import annotations

import collections
import io
from typing import Any, NamedTuple

import pytest
import torch

from rating_train.checkpoint.deepspeed_io import capture_shards, copy_to_memory, tensor_bytes

pytestmark = pytest.mark.timeout(60)


class Pair(NamedTuple):
    a: torch.Tensor
    b: int


class Named(dict):  # type: ignore[type-arg]
    """A dict with an attribute, as a module's state dict has ``_metadata``."""

    note = ""


def storages(state: Any) -> set[int]:
    """Return the memory addresses of all tensors in nested containers."""
    if isinstance(state, torch.Tensor):
        return {state.untyped_storage().data_ptr()}
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return set().union(*map(storages, values))


def test_a_copy_shares_no_memory_with_the_original_at_any_depth() -> None:
    shared = torch.arange(6.0)
    state = {
        "tensor": torch.ones(3),
        "list": [torch.ones(2), {"deep": (torch.ones(1), [torch.ones(4, dtype=torch.bfloat16)])}],
        "pair": Pair(torch.ones(5), 3),
        "twice": [shared, shared],
        "plain": {"numbers": [1, 2.5], "text": "x", "none": None},
    }
    copied = copy_to_memory(state)
    assert not storages(state) & storages(copied)
    for part in ("tensor", "list", "pair", "twice"):
        torch.testing.assert_close(copied[part], state[part], rtol=0, atol=0)
    assert copied["plain"] == state["plain"]
    state["plain"]["numbers"].append(9)  # type: ignore[index,union-attr]
    state["list"][1]["deep"][1][0].zero_()  # type: ignore[index]
    assert copied["plain"]["numbers"] == [1, 2.5] and copied["list"][1]["deep"][1][0].sum() == 4


def test_container_types_are_kept() -> None:
    metadata = Named(b=torch.ones(2), a=torch.ones(3))
    metadata.note = "kept"
    state = {
        "ordered": collections.OrderedDict(z=torch.ones(1), a=torch.ones(2)),
        "default": collections.defaultdict(list, x=[torch.ones(1)]),
        "named": metadata,
        "tuple": (1, torch.ones(1)),
        "pair": Pair(torch.ones(1), 2),
        "size": torch.Size([2, 3]),
    }
    copied = copy_to_memory(state)
    assert {k: type(v) for k, v in copied.items()} == {k: type(v) for k, v in state.items()}
    assert list(copied["ordered"]) == ["z", "a"] and list(copied["named"]) == ["b", "a"]
    assert copied["named"].note == "kept" and copied["default"].default_factory is list
    assert copied["pair"].b == 2 and copied["size"] == (2, 3)
    assert copied["named"]["b"] is not metadata["b"], "the original dict is unchanged"


def test_tensors_become_compact_plain_tensors() -> None:
    original = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(torch.ones(2))
    views = {
        "row": original[1],
        "transposed": original.t(),
        "strided": original[:, ::2],
        "scalar": torch.tensor(7),
    }
    copied = copy_to_memory({**views, "parameter": parameter})
    for name, view in views.items():
        assert copied[name].equal(view) and copied[name].is_contiguous(), name
        assert copied[name].untyped_storage().nbytes() == view.nbytes, (
            f"{name}: only what is looked at is saved"
        )
    assert not copied["parameter"].requires_grad and copied["parameter"].device.type == "cpu"


def test_tensor_bytes_counts_all_tensors_and_matches_the_file_size() -> None:
    state = {
        "w": torch.zeros(1000, dtype=torch.bfloat16),
        "nested": [{"m": torch.zeros(10, 20)}, (torch.zeros(3, dtype=torch.int64), 5, "text", None)],
        "view": torch.zeros(1 << 20)[:100],
        "none": torch.zeros(0),
    }
    assert tensor_bytes(state) == 2000 + 800 + 24 + 400
    assert tensor_bytes("text") == tensor_bytes({}) == tensor_bytes(None) == 0
    big = copy_to_memory({"w": torch.zeros(1 << 18), "view": torch.zeros(1 << 20)[:100]})
    file = io.BytesIO()
    torch.save(big, file)
    assert 0 < file.tell() - tensor_bytes(big) < 8192


class FakeEngine:
    """Saves its state as DeepSpeed does, and may fail halfway."""

    def __init__(self, fails: bool) -> None:
        self.checkpoint_engine = self.own = object()
        self.weights, self.fails = torch.ones(4), fails

    def _copy_recovery_script(self, path: str) -> None:
        raise AssertionError("nothing is written")

    def save_checkpoint(self, directory: str, tag: str, save_latest: bool) -> None:
        self._copy_recovery_script(directory)
        self.checkpoint_engine.save({"w": self.weights}, f"{directory}/{tag}/model.pt")  # type: ignore[attr-defined]
        if self.fails:
            raise RuntimeError("out of memory")


def test_capturing_leaves_the_engine_unchanged() -> None:
    for fails in (False, True):
        ds = FakeEngine(fails)
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                capture_shards(ds)
        else:
            shard = capture_shards(ds)
            ds.weights.zero_()
            assert list(shard) == ["engine/model.pt"] and shard["engine/model.pt"]["w"].sum() == 4
        assert ds.checkpoint_engine is ds.own and "_copy_recovery_script" not in vars(ds)
