"""`stages`: which steps each phase has, with which settings and learning rates; and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rating_train.config.load import config_from_dict, dump_config, load_config
from rating_train.config.lr_schedule import lr_factor
from rating_train.config.phases import (
    Phase,
    check_stages,
    length_in_words,
    phase_after,
    phases,
    stage_configs,
    trained_in_words,
)
from rating_train.config.resolve import total_steps
from rating_train.config.schema import Config
from rating_train.errors import UserError

pytestmark = pytest.mark.timeout(60)

FROZEN = ["vision", "connector", "decoder"]


def staged(*stages: dict[str, Any], **sections: Any) -> Config:
    return config_from_dict({"batch": {"global_items": 10}, **sections, "stages": list(stages)})


def factor(phase: Phase, step: int) -> float:
    """Share of the peak learning rates, as the engine of the phase computes it."""
    return lr_factor(step, phase.last_step, phase.config.optim, phase.first_step)


def problem(*stages: Any, **sections: Any) -> str:
    """The message of the error that these phases give."""
    with pytest.raises(UserError) as error:
        config_from_dict({**sections, "stages": list(stages)})
    return str(error.value)


def test_without_stages_a_run_is_one_phase_with_its_own_settings() -> None:
    config = config_from_dict({"train": {"epochs": 2}, "batch": {"global_items": 10}})
    (only,) = phases(config, 95)
    assert (only.first_step, only.last_step, only.config) == (0, 19, config)
    assert only.is_last and only.identity() == {} and total_steps(config, 95) == 19
    assert [factor(only, k) for k in range(19)] == [lr_factor(k, 19, config.optim) for k in range(19)]


@pytest.mark.parametrize(
    ("stages", "max_steps", "ends"),
    [
        ([{"epochs": 1}, {"epochs": 1}, {"epochs": 2}], 0, [10, 19, 38]),  # of 95 items: 9.5, 19, 38 steps
        ([{"steps": 7}, {"epochs": 1}, {"steps": 1}], 0, [7, 17, 18]),  # 7, 16.5, 17.5
        ([{"epochs": 0.001}, {"epochs": 0.001}, {"steps": 3}], 0, [1, 2, 4]),  # each has a step
        ([{"steps": 7}, {"steps": 5}, {"steps": 9}], 9, [7, 9]),
        ([{"steps": 7}, {"steps": 5}], 7, [7]),
        ([{"steps": 7}, {"steps": 5}], 100, [7, 12]),
    ],
)
def test_where_phases_end(stages: list[dict[str, Any]], max_steps: int, ends: list[int]) -> None:
    config = staged(*stages, train={"max_steps": max_steps})
    found = phases(config, 95)
    assert [p.last_step for p in found] == ends and total_steps(config, 95) == ends[-1]
    assert [p.first_step for p in found] == [0, *ends[:-1]]
    assert [p.is_last for p in found] == [False] * (len(ends) - 1) + [True]
    assert [p.count for p in found] == [len(ends)] * len(ends)


def test_two_phases_of_one_epoch_are_as_long_as_a_run_of_two() -> None:
    one = config_from_dict({"train": {"epochs": 2}, "batch": {"global_items": 10}})
    assert total_steps(staged({"epochs": 1}, {"epochs": 1}), 95) == total_steps(one, 95)


def test_what_a_phase_overrides_and_what_it_keeps() -> None:
    config = staged(
        {"epochs": 1, "freeze": FROZEN, "lr": {"head": "1e-3"}, "warmup_fraction": 0.5},
        {"steps": 4, "freeze": []},
        {"epochs": 1},
        model={"freeze": ["vision"]},
        optim={"lr": {"head": 2e-4}, "warmup_fraction": 0.1, "schedule": "cosine"},
    )
    first, second, third = stage_configs(config)
    assert (first.model.freeze, second.model.freeze, third.model.freeze) == (FROZEN, [], ["vision"])
    assert (first.optim.lr.head, second.optim.lr.head) == (1e-3, 2e-4)
    assert (first.optim.warmup_fraction, second.optim.warmup_fraction) == (0.5, 0.1)
    assert first.optim.lr.decoder == config.optim.lr.decoder and first.optim.schedule == "cosine"
    assert first == dataclasses.replace(config, model=first.model, optim=first.optim, stages=None)


def test_each_phase_has_a_schedule_of_its_own() -> None:
    config = staged({"steps": 4, "warmup_fraction": 0.5}, {"steps": 3}, optim={"warmup_fraction": 0.0})
    first, second = phases(config, 100)
    assert [factor(first, step) for step in range(4)] == [0.5, 1.0, 1.0, 0.0]
    assert [factor(second, step) for step in range(4, 7)] == [1.0, 0.5, 0.0]


def test_a_step_at_the_end_of_a_phase_belongs_to_it() -> None:
    found = phases(staged({"steps": 3}, {"steps": 2}), 100)
    assert [phase_after(found, step).number for step in (0, 2, 3, 4, 5, 9)] == [1, 1, 1, 2, 2, 2]
    assert phase_after(found, 4).identity() == {"phase": 2, "phase_first_step": 3}


def test_a_phase_is_told_in_words() -> None:
    first, second = phases(staged({"steps": 3, "freeze": FROZEN}, {"steps": 2}), 100)
    assert str(first) == "phase 1 of 2, steps 1 to 3: training head; frozen: vision, connector, decoder"
    assert str(second) == "phase 2 of 2, steps 4 to 5: training vision, connector, decoder, head"


def test_stages_survive_the_resolved_configuration(tmp_path: Any) -> None:
    config = staged({"epochs": 1.5, "freeze": FROZEN}, {"steps": 2, "lr": {"decoder": 1e-4}}, name="a")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert load_config(path, ["stages=null"]).stages is None
    assert load_config(path, ["stages=[{steps: 2}]"]).stages == staged({"steps": 2}).stages


def test_all_mistakes_in_one_error() -> None:
    text = problem(
        {"epochs": 1, "steps": 2, "freeze": ["visoin"], "frezee": 3},
        {"steps": 0},
        {},
        {"epochs": "x"},
        5,
        {"steps": 3, "freeze": [*FROZEN, "head"]},
        {"steps": 2, "freeze": ["vision"], "lr": {"vision": 1e-3, "connector": 0, "decoder": 0, "head": 0}},
        {"steps": 2, "lr": {"heads": 1, "decoder": 2}, "warmup_fraction": 2},
    )
    for sentence in (
        "unknown key `stages[0].frezee` (did you mean `stages[0].freeze`?)",
        "`stages[0]` has both `epochs` and `steps`",
        "`stages[0].freeze` holds 'visoin', expected any of vision, connector, decoder, head (did you mean `vision`?)",
        "`stages[1].steps` is 0, expected at least 1",
        "`stages[2]` has neither `epochs` nor `steps`",
        "`stages[3].epochs` is 'x' (str), expected a finite number",
        "`stages[4]` is a section, not 5 (int)",
        "`stages[5]` trains nothing: `freeze` is vision, connector, decoder, head",
        "`stages[6]` trains nothing: the learning rate of connector, decoder, head is 0",
        "`stages[6].lr.vision` is given, but `freeze` of the phase holds vision",
        "unknown key `stages[7].lr.heads` (did you mean `stages[7].lr.head`?)",
        "`stages[7].lr.decoder` is 2, expected between 0 and 1",
        "`stages[7].warmup_fraction` is 2, expected between 0 and 1",
    ):
        assert sentence in text, sentence
    assert text.startswith("13 problems: "), "none is told twice"


@pytest.mark.parametrize(
    ("values", "told"), [([], "`stages` is empty, expected at least one phase"), (7, "a list")]
)
def test_no_list_of_phases(values: Any, told: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_dict({"stages": values})
    assert str(error.value).startswith("1 problem: ") and told in str(error.value)


def test_a_phase_of_parts_that_the_model_does_not_have_trains_nothing() -> None:
    only_vision = {"steps": 1, "freeze": ["decoder", "head"]}
    told = "`stages[0]` trains nothing: `freeze` is decoder, head (without images there is no vision tower)"
    assert told in problem(only_vision, model={"inputs": ["text"]})
    config = staged(only_vision)  # a task without images leaves them out only when its dataset is known
    check_stages(config)
    with pytest.raises(UserError, match=r"`stages\[0\]` trains nothing"):
        check_stages(dataclasses.replace(config, model=dataclasses.replace(config.model, inputs=["text"])))


def test_a_phase_trains_no_part_whose_output_is_stored() -> None:
    told = "`stages[1]` trains connector, whose output `data.features` holds fixed"
    sections = {"data": {"path": "d", "features": "f"}, "model": {"freeze": ["vision", "connector"]}}
    assert told in problem({"steps": 1}, {"steps": 1, "freeze": ["vision"]}, **sections)


def test_a_run_is_told_in_words() -> None:
    plain = config_from_dict({"model": {"freeze": ["vision"]}, "train": {"epochs": 2}})
    assert (trained_in_words(plain), length_in_words(plain)) == (
        "without vision (frozen)",
        "2 epochs at most",
    )
    config = staged({"epochs": 0.5, "freeze": FROZEN}, {"steps": 2000, "freeze": []})
    assert trained_in_words(config) == "in 2 phases (without vision, connector, decoder (frozen); in full)"
    assert length_in_words(config).startswith("phases of 0.5 epochs, 2,000 steps; ")
