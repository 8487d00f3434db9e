"""Distributed training of compact vision-language models that predict a number from an image and text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rating_train.export.hub.registration import register_auto_classes
    from rating_train.prediction.api import RatingModel, load

__version__ = "0.1.0"
__all__ = ["RatingModel", "__version__", "load", "register_auto_classes"]

#: Name -> module that it is imported from when it is asked for: ``import rating_train`` itself loads nothing heavy.
_LATE = {
    "RatingModel": "rating_train.prediction.api",
    "load": "rating_train.prediction.api",
    "register_auto_classes": "rating_train.export.hub.registration",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATE[name]), name)
