"""Settings of one phase of a staged run: an item of the list `stages` of :mod:`rating_train.config.schema`."""

from __future__ import annotations

from dataclasses import dataclass

from rating_train.config.fields import section, setting


@dataclass(frozen=True)
class StageRates:
    """Peak learning rates of a phase. What each key means is said at ``optim.lr``."""

    vision: float | None = setting(None, "As `optim.lr.vision`.", low=0, high=1)
    connector: float | None = setting(None, "As `optim.lr.connector`.", low=0, high=1)
    decoder: float | None = setting(None, "As `optim.lr.decoder`.", low=0, high=1)
    head: float | None = setting(None, "As `optim.lr.head`.", low=0, high=1)

    @property
    def given(self) -> dict[str, float]:
        """The rates that the phase sets: part -> rate."""
        return {part: rate for part, rate in vars(self).items() if rate is not None}


@dataclass(frozen=True)
class StageConfig:
    """One phase. What each key means is said at ``stages``."""

    epochs: float | None = setting(None, "As `train.epochs`, of this phase.", low=1e-9)
    steps: int | None = setting(None, "Optimizer steps of this phase, in place of `epochs`.", low=1)
    freeze: list[str] | None = setting(None, "As `model.freeze`.")
    lr: StageRates = section(StageRates, "As `optim.lr`.")
    warmup_fraction: float | None = setting(None, "As `optim.warmup_fraction`.", low=0, high=1)
