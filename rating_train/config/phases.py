"""The phases of a run: what each of the ``stages`` trains, from which step to which. Pure functions.

A run without ``stages`` is one phase with the configuration's own settings. Steps are those of the complete run: when a
phase starts, ``first_step`` steps are done, and when it ends, ``last_step``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rating_train.config.fields import read
from rating_train.config.resolve import phase_ends
from rating_train.config.schema import PARTS, Config
from rating_train.config.stage_schema import StageConfig
from rating_train.errors import one_error


@dataclass(frozen=True)
class Phase:
    """Consecutive steps that train the same parts with the same optimizer.

    Attributes:
        number: from 1.
        count: phases of the run; 0 for a run without ``stages``.
        first_step: steps done before it.
        last_step: steps done when it ends.
        config: the run's configuration with the settings of this phase.
    """

    number: int
    count: int
    first_step: int
    last_step: int
    config: Config

    @property
    def is_last(self) -> bool:
        """Whether the run ends with it."""
        return self.number >= self.count

    @property
    def trained(self) -> list[str]:
        """Parts of the model that it trains."""
        return trained_parts(self.config)

    def identity(self) -> dict[str, int]:
        """Return what a checkpoint in it records, so that its optimizer state resumes in no other phase."""
        return {"phase": self.number, "phase_first_step": self.first_step} if self.count else {}

    def __str__(self) -> str:
        frozen = [part for part in PARTS if part in self.config.model.freeze]
        return (
            f"phase {self.number} of {self.count}, steps {self.first_step + 1} to {self.last_step}: "
            f"training {', '.join(self.trained)}{'; frozen: ' + ', '.join(frozen) if frozen else ''}"
        )


def phases(config: Config, train_items: int) -> list[Phase]:
    """Return the phases of a run in order; ``train.max_steps`` ends the one that it falls into, and with it the run."""
    ends = phase_ends(config, train_items)
    count = len(ends) if config.stages is not None else 0
    starts = [0, *ends[:-1]]
    return [
        Phase(number, count, first, last, own)
        for number, (first, last, own) in enumerate(zip(starts, ends, stage_configs(config)), start=1)
    ]


def phase_after(found: Sequence[Phase], step: int) -> Phase:
    """Return the phase that a run with ``step`` steps done is in; at the end of a phase still that one."""
    return next((phase for phase in found if step <= phase.last_step), found[-1])


def stage_configs(config: Config) -> list[Config]:
    """Return the configuration of each phase, as if a run had that phase alone."""
    if config.stages is None:
        return [config]
    return [_with(config, stage) for stage in config.stages]


def _with(config: Config, stage: StageConfig) -> Config:
    optim = dataclasses.replace(config.optim, lr=dataclasses.replace(config.optim.lr, **stage.lr.given))
    if stage.warmup_fraction is not None:
        optim = dataclasses.replace(optim, warmup_fraction=stage.warmup_fraction)
    freeze = config.model.freeze if stage.freeze is None else stage.freeze
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, freeze=freeze), optim=optim, stages=None
    )


def trained_parts(config: Config) -> list[str]:
    """Return the parts that a model has and that are not frozen."""
    absent = () if "image" in config.model.inputs else ("vision", "connector")
    return [part for part in PARTS if part not in config.model.freeze and part not in absent]


def trained_in_words(config: Config) -> str:
    """Return what a run trains: ``in full``, ``without vision (frozen)``, or that of each phase."""
    told = [
        f"without {', '.join(one.model.freeze)} (frozen)" if one.model.freeze else "in full"
        for one in stage_configs(config)
    ]
    return told[0] if len(told) == 1 else f"in {len(told)} phases ({'; '.join(told)})"


def largest_in_words(config: Config, largest: Config) -> str:
    """Return a sentence that says of which phase the figures of a run with ``stages`` are; "" without ``stages``.

    Args:
        config: the run's configuration.
        largest: that of the phase, as :func:`stage_configs` gives it.
    """
    if config.stages is None:
        return ""
    found = stage_configs(config)
    number = found.index(largest) + 1
    return f"These figures are those of phase {number} of {len(found)}, which trains the most parameters."


def length_in_words(config: Config) -> str:
    """Return how long a run trains, or each of its phases."""
    if config.stages is None:
        return f"{config.train.epochs:g} epochs at most"
    lengths = [f"{s.steps:,} steps" if s.steps else f"{s.epochs:g} epochs" for s in config.stages]
    return f"phases of {', '.join(lengths)}; what each overrides is in `stages` of the run's config.yaml"


def check_stages(config: Config) -> None:
    """Refuse phases that train nothing, once the task has said what the model reads.

    Raises:
        UserError: all of them in one error.
    """
    problems = [sentence for _, sentence in _problems(config, config.stages or [])]
    if problems:
        raise one_error(problems, where="stages")


def stage_problems(values: Any, config: Config, problems: Mapping[str, str]) -> list[str]:
    """Return the sentences of what is wrong with the phases of a configuration, apart from single values.

    Args:
        values: ``stages`` as given, of which some values may be wrong by themselves.
        config: the configuration that was read.
        problems: key -> sentence of what is known to be wrong; it is not said twice.
    """
    if values is None or "stages" in problems:
        return []
    # Of a list with one wrong value nothing is kept: the valid rest is read again, to check all of it at once.
    stages = [read(StageConfig, value, {}) for value in values]
    if not stages:
        return ["`stages` is empty, expected at least one phase (or null: a run without phases)"]
    return [
        sentence
        for keys, sentence in _problems(config, stages)
        if not any(bad.startswith(key) or key.startswith(f"{bad}.") for bad in problems for key in keys)
    ]


def _problems(config: Config, stages: Sequence[StageConfig]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (the keys concerned, a sentence) of each problem."""
    for index, stage in enumerate(stages):
        here = f"stages[{index}]"
        lengths = f"{here}.epochs", f"{here}.steps"
        if stage.epochs is not None and stage.steps is not None:
            yield lengths, f"`{here}` has both `epochs` and `steps`, expected one of them"
        elif stage.epochs is None and stage.steps is None:
            yield lengths, f"`{here}` has neither `epochs` nor `steps`, expected one of them"
        unknown = [part for part in stage.freeze or [] if part not in PARTS]
        if unknown:
            close = difflib.get_close_matches(unknown[0], PARTS, n=1)
            hint = f" (did you mean `{close[0]}`?)" if close else ""
            yield (
                (f"{here}.freeze",),
                f"`{here}.freeze` holds {', '.join(map(repr, unknown))}, expected any of {', '.join(PARTS)}{hint}",
            )
            continue
        yield from _training_problems(here, _with(config, stage), stage)


def _training_problems(
    here: str, config: Config, stage: StageConfig
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield what is wrong with the parts that a phase trains, and with their learning rates."""
    keys, trained = (f"{here}.freeze", f"{here}.lr", "model.freeze", "model.inputs"), trained_parts(config)
    if not trained:
        absent = "" if "image" in config.model.inputs else " (without images there is no vision tower)"
        frozen = ", ".join(config.model.freeze)
        yield keys, f"`{here}` trains nothing: `freeze` is {frozen}{absent}"
        return
    if not any(getattr(config.optim.lr, part) for part in trained):
        yield keys, f"`{here}` trains nothing: the learning rate of {', '.join(trained)} is 0"
    moving = [part for part in ("vision", "connector") if part in trained]
    if config.data.features and moving:
        yield (
            (*keys, "data.features"),
            f"`{here}` trains {' and '.join(moving)}, whose output `data.features` holds fixed",
        )
    for part in stage.lr.given:
        if part in config.model.freeze:
            yield keys, f"`{here}.lr.{part}` is given, but `freeze` of the phase holds {part}"
