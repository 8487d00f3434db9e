"""The training state: counters, the best value, and the comparison of identities."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rating_train.checkpoint.state import Identity, TrainState, check_identity, from_json, to_json
from rating_train.errors import UserError

ORDER = {"data_fingerprint": "aa", "shuffle_seed": 9176, "global_items": 64}
ENGINE = {"precision": "bf16", "freeze": ["vision"]}
TOPOLOGY = {"ranks": 2, "zero_stage": 2}


def identity(
    digest: str = "d1",
    order: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    topology: dict[str, int] | None = None,
) -> Identity:
    return Identity({**ORDER, **(order or {})}, digest, {**ENGINE, **(engine or {})}, topology or TOPOLOGY)


def test_skipped_steps_count_as_steps_and_samples() -> None:
    state = TrainState()
    for skipped in (False, True, True, False, True):
        state.record_step(64)
        state.record_skip(skipped)
    assert (state.step, state.samples, state.skipped_steps, state.skipped_in_a_row) == (5, 320, 3, 1)


def test_a_good_step_resets_the_skips_in_a_row() -> None:
    state = TrainState()
    seen = []
    for skipped in (True, True, False, True):
        state.record_step(1)
        state.record_skip(skipped)
        seen.append(state.skipped_in_a_row)
    assert seen == [1, 2, 0, 1]


@pytest.mark.parametrize(
    ("values", "larger", "best", "at", "since"),
    [
        ([0.1, 0.3, 0.2, 0.3], True, 0.3, 2, 2),
        ([0.9, 0.3, 0.2, 0.3], False, 0.2, 3, 1),
        ([None, 0.1, None], True, 0.1, 2, 1),
        ([None, None], True, None, None, 2),
        ([-0.5, -0.6], True, -0.5, 1, 1),
        ([0.0, 0.0], False, 0.0, 1, 1),
    ],
)
def test_the_best_value_is_kept_and_ties_and_undefined_ones_do_not_count(
    values: list[float | None], larger: bool, best: float | None, at: int | None, since: int
) -> None:
    state = TrainState()
    answers = []
    for value in values:
        state.record_step(1)
        answers.append(state.record_metric(value, larger))
    assert (state.best_value, state.best_step, state.evals_since_best) == (best, at, since)
    assert [i + 1 for i, a in enumerate(answers) if a][-1:] == ([at] if at else [])


def test_a_state_round_trips_through_json() -> None:
    state = TrainState(7, 448, 0.1 + 0.2, 5, 2, 3, 1)
    content = json.loads(json.dumps(to_json(state, identity(), 100)))
    assert from_json(content) == state and content["total_steps"] == 100
    assert from_json(json.loads(json.dumps(to_json(TrainState(), identity(), 1)))) == TrainState()


def saved(now: Identity) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(to_json(TrainState(), now, 100)))
    return content


def test_the_same_identity_is_accepted_also_after_a_json_round_trip() -> None:
    check_identity(saved(identity()), identity(), "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": {"data_fingerprint": "bb"}}, r"data_fingerprint was 'aa' and is now 'bb'"),
        ({"order": {"global_items": 32}}, r"global_items was 64 and is now 32"),
        ({"engine": {"precision": "fp32"}}, r"precision was 'bf16' and is now 'fp32'"),
        ({"topology": {"ranks": 2, "zero_stage": 0}}, r"zero_stage was 2 and is now 0"),
        ({"engine": {"freeze": []}}, r"freeze was \['vision'\] and is now \[\]"),
        ({"order": {"new_setting": 1}}, r"new_setting was None and is now 1"),
        ({"digest": "d2"}, r"another order than before"),
    ],
)
def test_every_difference_is_refused_with_old_and_new_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_identity(saved(identity()), identity(**changes), "step_00000005")
    assert caught.value.where == "step_00000005"


def test_all_differences_are_listed_in_one_error() -> None:
    now = identity(
        order={"shuffle_seed": 1, "global_items": 2},
        engine={"precision": "fp32"},
        topology={"ranks": 2, "zero_stage": 0},
    )
    with pytest.raises(UserError) as caught:
        check_identity(saved(identity()), now, "x")
    assert [w in caught.value.what for w in ("shuffle_seed", "global_items", "precision", "zero_stage")] == [
        True
    ] * 4


def test_a_setting_that_the_checkpoint_had_and_this_version_lacks_is_a_difference() -> None:
    before = identity(order={"gone": 5})
    with pytest.raises(UserError, match="gone was 5 and is now None"):
        check_identity(saved(before), identity(), "x")


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (4, 2), (3, 1), (2, 3)])
def test_another_number_of_ranks_or_sharded_stage_is_accepted(ranks: int, stage: int) -> None:
    saved = to_json(TrainState(), identity(), 10)
    check_identity(saved, identity(topology={"ranks": ranks, "zero_stage": stage}), "here")
