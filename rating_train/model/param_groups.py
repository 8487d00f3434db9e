"""Assign every trained parameter to exactly one optimizer group: part of the model x (decayed or not)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from rating_train.config.schema import PARTS, OptimConfig
from rating_train.log import text_table
from rating_train.model.regressor import part_of


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a peak learning rate and a weight decay."""

    name: str
    peak_lr: float
    weight_decay: float
    parameters: tuple[nn.Parameter, ...]

    @property
    def matrices(self) -> bool:
        """Whether these are the matrices of linear and convolution layers."""
        return not self.name.endswith("/no_decay")

    @property
    def numel(self) -> int:
        # Under ZeRO-3 a parameter that is not gathered is empty; ds_numel is its real size.
        return sum(int(getattr(p, "ds_numel", p.numel())) for p in self.parameters)


def param_groups(model: nn.Module, config: OptimConfig) -> list[ParamGroup]:
    """Group the parameters that require a gradient, in a fixed order, without empty groups.

    Weight decay applies to the matrices of linear and convolution layers, not to biases, norms and embeddings.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    buckets: dict[tuple[str, bool], list[nn.Parameter]] = {
        (part, decayed): [] for part in PARTS for decayed in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 and id(parameter) not in embeddings
            buckets[part_of(name), decayed].append(parameter)
    return [
        ParamGroup(
            name=f"{part}/{'decay' if decayed else 'no_decay'}",
            peak_lr=float(getattr(config.lr, part)),
            weight_decay=config.weight_decay if decayed else 0.0,
            parameters=tuple(parameters),
        )
        for (part, decayed), parameters in buckets.items()
        if parameters
    ]


def for_optimizer(groups: list[ParamGroup]) -> list[dict[str, Any]]:
    """Convert groups to the form of torch.optim. Learning rates are 0 until the schedule sets them."""
    return [{"params": list(g.parameters), "lr": 0.0, "weight_decay": g.weight_decay} for g in groups]


def group_table(model: nn.Module, groups: list[ParamGroup]) -> str:
    """Render the groups, and what is frozen, as a table for the log."""
    rows = [[g.name, f"{g.numel:,}", f"{g.peak_lr:.2g}", f"{g.weight_decay:g}"] for g in groups]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    rows += [["trained", f"{sum(g.numel for g in groups):,}", "", ""], ["frozen", f"{frozen:,}", "", ""]]
    return "\n".join(text_table(["group", "parameters", "peak lr", "decay"], rows))
