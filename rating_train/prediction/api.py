"""Scores from Python: ``from rating_train import load``.

model = load("runs/full_ft_228m")
stars = model.score("brush.jpg", {"title": "Brush", "features": ["soft"], "main_category": "All Beauty"})
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

from PIL import Image

from rating_train.errors import UserError, one_error
from rating_train.prediction.decode import sample_of
from rating_train.prediction.model import Scorer, find_model, load_scorer, pick_device
from rating_train.prepare.images.lookup import DEFAULT_MAX_BYTES, ImageProblem, read_bounded
from rating_train.prepare.images.square import square_file
from rating_train.prepare.records.listing import plain_text

#: A picture: the path of a file, the bytes of one, or a ``PIL.Image``.
Picture: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image"
#: A listing: ``title``, ``description``, ``features``, ``main_category``, each text, a list of texts, or left out.
Fields: TypeAlias = "Mapping[str, Any]"


class RatingModel:
    """A loaded model. Made by :func:`load`.

    Scores are those of ``rating-train evaluate``: images become the squares that the model was trained on, texts are
    cut and tokenized as in training, and the forward pass runs in the run's precision. A picture that has been decoded
    may differ by the decoder's own reduction; give its path, its bytes, or the picture as it was opened.
    """

    def __init__(self, scorer: Scorer, batch_items: int) -> None:
        self._scorer = scorer
        self._batch_items = batch_items

    @property
    def name(self) -> str:
        """The run and the step, or the exported folder."""
        return str(self._scorer.found.identity["model"])

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(self._scorer.predictor.device)

    @overload
    def score(self, images: Picture | None, listings: Fields) -> float: ...

    @overload
    def score(self, images: Sequence[Picture] | None, listings: Sequence[Fields]) -> list[float]: ...

    def score(
        self, images: Picture | Sequence[Picture] | None, listings: Fields | Sequence[Fields]
    ) -> float | list[float]:
        """Predict average ratings.

        Args:
            images: one picture, or a sequence of them; ``None`` for a model that reads text alone.
            listings: the listing of that picture, or a sequence, one for each; ``{}`` where no text is read.

        Returns:
            in the unit of the target (stars: in (1, 5)): one number, or a list in the order of the arguments.

        Raises:
            UserError: numbers of images and listings that differ, or, all together, pictures and fields that cannot be
                used, each with its position.
        """
        if isinstance(listings, Mapping):
            return self._score(None if images is None else [images], [listings])[0]  # type: ignore[list-item]
        if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
            raise UserError(
                "one image for several listings", where="score", expected="as many images as listings"
            )
        return self._score(None if images is None else list(images), list(listings))

    def _score(self, images: list[Picture] | None, listings: list[Fields]) -> list[float]:
        if images is None and self._scorer.found.config.model_px:
            raise UserError("this model reads an image", where="score", expected="as many images as listings")
        if images is not None and len(images) != len(listings):
            raise UserError(
                f"{len(images)} images for {len(listings)} listings",
                where="score",
                expected="as many images as listings",
            )
        scores: list[float] = []
        pictures: list[Picture] = [b""] * len(listings) if images is None else images
        for begin in range(0, len(listings), self._batch_items):
            end = begin + self._batch_items
            samples = self._samples(pictures[begin:end], listings[begin:end], begin)
            scores += self._scorer.predictor(self._scorer.collator(samples)).tolist()
        return scores

    def _samples(self, images: list[Picture], listings: list[Fields], first: int) -> list[dict[str, Any]]:
        squares, names = self._scorer.found.squares, self._scorer.inputs.prompt.words.names
        looks, samples, problems = bool(self._scorer.found.config.model_px), [], []
        for number, (image, listing) in enumerate(zip(images, listings), start=first):
            try:
                texts = {name: plain_text(listing.get(name), name) for name in names}
                file = square_file(_read(image), squares.size_px, squares.jpeg_quality) if looks else b""
                samples.append(sample_of(str(number), texts, file))
            except ImageProblem as e:
                problems.append(f"image {number}: {e.reason} ({e.detail})")
            except TypeError as e:
                problems.append(f"listing {number}: {e}")
        if problems:
            raise one_error(problems, where="score")
        return samples


def load(
    path: str | os.PathLike[str],
    *,
    checkpoint: str = "best",
    device: str = "auto",
    batch_items: int = 32,
    settings: Sequence[str] = (),
) -> RatingModel:
    """Load a model for scoring.

    Args:
        path: run directory, or folder made by ``rating-train export``.
        checkpoint: of a run: best, latest or a step.
        device: auto (a GPU if there is one), cuda or cpu.
        batch_items: most items of one forward pass.
        settings: ``section.key=value``, what is to differ from the run's configuration, for example ``data.path=DATA``
            where its dataset has moved.

    Raises:
        UserError: neither a run nor an exported folder, no such checkpoint, or a damaged one.
    """
    if batch_items < 1:
        raise UserError(f"batch_items is {batch_items}", where="load", expected="1 or more")
    found = find_model(Path(path), checkpoint, tuple(settings))
    return RatingModel(load_scorer(found, pick_device(device)), batch_items)


def _read(image: Picture) -> bytes | Image.Image:
    return read_bounded(image, DEFAULT_MAX_BYTES) if isinstance(image, (str, os.PathLike)) else image  # type: ignore[arg-type]
