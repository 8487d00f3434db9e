"""Names of shared memory: claimed by one process alone, whoever else starts at the same moment."""

from __future__ import annotations

import secrets
from types import SimpleNamespace

import pytest

from rating_train.data import shared_memory

ALONE = SimpleNamespace(is_local_leader=True, node=0, ranks_per_node=1)


def test_a_name_that_is_taken_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the other claims it between the look and the claim, and where only a part of its blocks is left."""
    first_number = 10**6 + secrets.randbelow(10**6)  # seven digits: none of a real dataset's
    drawn = iter([0, 0, 0, 1])
    monkeypatch.setattr(secrets, "randbelow", lambda _: first_number + next(drawn))
    number, first = shared_memory.claim(["a"], [None], ALONE)
    assert number == first_number
    looks = iter([True, False, False])  # seen; then not seen, but there; then another number
    monkeypatch.setattr(shared_memory, "_is_used", lambda _: next(looks))
    other, second = shared_memory.claim(["a"], [None], ALONE)
    try:
        assert other == first_number + 1
        assert bytes(first.buf[4:5]) == bytes(second.buf[4:5]) == b"a"
        monkeypatch.undo()
        assert shared_memory._is_used(number) and not shared_memory._is_used(number + 5)
    finally:
        first.cleanup()
        second.cleanup()
    monkeypatch.setattr(shared_memory, "_is_used", lambda _: True)
    with pytest.raises(RuntimeError, match="no free name for shared memory in 100 tries"):
        shared_memory.claim(["a"], [None], ALONE)
