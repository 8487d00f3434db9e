"""DeepSpeed's two layouts of parameters over ranks, as pure functions: parameters are read back completely."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rating_train.checkpoint import zero_shards
from rating_train.checkpoint.zero_shards import (
    MASTER,
    Shards,
    read_flat,
    read_per_parameter,
    write_flat,
    write_per_parameter,
)

SIZES = (7, 1, 12, 3)


def parameters() -> list[Tensor]:
    return [torch.arange(n, dtype=torch.float32) + 100 * i + 1 for i, n in enumerate(SIZES)]


def cut(ranks: int, layout: str) -> tuple[list[Tensor], list[int]]:
    """Return the vector of every rank and the offset of every parameter, as an engine of so many ranks holds them."""
    readers = [(p.numel(), lambda p=p: p) for p in parameters()]
    if layout == "flat":
        size = -(-sum(SIZES) // (4 * ranks)) * 4  # padded to a multiple of 4, as alignment does
        vectors = [torch.full((size,), torch.nan) for _ in range(ranks)]
        for rank, vector in enumerate(vectors):
            write_flat(vector, rank, iter(readers))
        return vectors, [sum(SIZES[:i]) for i in range(len(SIZES))]
    widths = [-(-n // ranks) for n in SIZES]
    vectors = [torch.full((sum(widths),), torch.nan) for _ in range(ranks)]
    for rank, vector in enumerate(vectors):
        write_per_parameter(vector, rank, ranks, iter(readers))
    return vectors, [sum(widths[:i]) for i in range(len(widths))]


@pytest.mark.parametrize("layout", ["flat", "per_parameter"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 30])
def test_partitioned_parameters_are_read_back_and_padding_is_zero(ranks: int, layout: str) -> None:
    vectors, offsets = cut(ranks, layout)
    read = read_flat if layout == "flat" else read_per_parameter
    for parameter, offset in zip(parameters(), offsets, strict=True):
        assert torch.equal(read(vectors, offset, parameter.numel()), parameter)
    everything = torch.cat(vectors)
    assert everything.isfinite().all() and int((everything != 0).sum()) == sum(SIZES)


def test_a_rank_reads_only_the_parameters_that_it_holds_part_of() -> None:
    asked: list[int] = []

    def reader(i: int):
        def read() -> Tensor:
            asked.append(i)
            return parameters()[i]

        return SIZES[i], read

    write_flat(torch.empty(6), 1, (reader(i) for i in range(4)))  # elements 6 to 11
    assert asked == [0, 1, 2]


def test_the_layout_is_deepspeeds() -> None:
    """As observed in files of DeepSpeed 0.19.8: 3 elements over 2 ranks are 2 and 1, then padding."""
    vectors = [torch.empty(2), torch.empty(2)]
    for rank in (0, 1):
        write_per_parameter(vectors[rank], rank, 2, iter([(3, lambda: torch.tensor([1.0, 2, 3]))]))
    assert [v.tolist() for v in vectors] == [[1, 2], [3, 0]]


def test_only_the_files_that_hold_a_part_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run that moves to another number of ranks would open the square of it."""
    vectors, _ = cut(5, "flat")
    shapes = {f"p{i}": torch.Size([n]) for i, n in enumerate(SIZES)}
    torch.save({"param_shapes": [shapes], "module": {}}, tmp_path / "mp_rank_00_model_states.pt")
    for rank, vector in enumerate(vectors):
        content = {"optimizer_state_dict": {"single_partition_of_fp32_groups": [vector]}}
        torch.save(content, tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    opened: list[str] = []
    load = zero_shards.load
    monkeypatch.setattr(zero_shards, "load", lambda path: opened.append(path.name) or load(path))
    for i, parameter in enumerate(parameters()):
        assert torch.equal(Shards(tmp_path, 2).read(f"p{i}", MASTER), parameter)
    opened.clear()
    shards = Shards(tmp_path, 2)
    assert torch.equal(shards.read("p2", MASTER), parameters()[2])  # elements 8 to 19, in pieces of 8
    assert [name.split("_")[4] for name in opened if "optim" in name] == ["0", "1", "2"]
