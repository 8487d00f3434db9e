"""A fingerprint of the weights of vision tower and connector, which ties stored features to them."""

from __future__ import annotations

import hashlib

import torch

from rating_train.model.regressor import RatingRegressor, part_of

_TOWER = ("vision", "connector")


def tower_fingerprint(model: RatingRegressor) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values of vision tower and connector, as they are computed with.

    Weights in bf16 and the fp32 weights that they were rounded from differ: so do their features.

    Args:
        model: with all of its weights in place (not under ZeRO stage 3). Copies them to the host one by one.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if part_of(name) in _TOWER:
            value = parameter.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
