"""The prompt of an image in tiles, laid out as by the processor of stock SmolVLM. One fixed length for every grid.

Before the text of :mod:`rating_train.data.prompt`, with V visual tokens for each tile::

    <|im_start|>User:{<fake_token_around_image><row_i_col_j> | <image> x V} per tile, a line break after each row,
    a second one after the last <fake_token_around_image><global-img> | <image> x V
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

from rating_train.data.field_tokenizer import id_bytes
from rating_train.data.prompt import BEFORE_IMAGE, EncodedPrompt, PromptEncoder, PromptLayout, PromptWords

_AROUND = "<fake_token_around_image>"
_OPENING = BEFORE_IMAGE[: BEFORE_IMAGE.index(_AROUND)]
_COMPLETE = BEFORE_IMAGE[BEFORE_IMAGE.index(_AROUND) :]


class TiledPromptEncoder(PromptEncoder):
    """An encoder of listings whose image is cut into tiles.

    Args:
        tokenizer, text_tokens, field_chars, words: as of :class:`PromptEncoder`; markers of tiles are not text tokens.
        visual_tokens: V, image tokens of a tile.
        tiles_per_side: most tiles beside or above one another.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        visual_tokens: int,
        text_tokens: int,
        field_chars: int,
        tiles_per_side: int,
        words: PromptWords,
    ) -> None:
        super().__init__(tokenizer, visual_tokens, text_tokens, field_chars, words)

        def piece(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        visual, places = [self.image_token_id] * visual_tokens, range(1, tiles_per_side + 1)
        self._tiles = {(r, c): piece(f"{_AROUND}<row_{r}_col_{c}>") + visual for r in places for c in places}
        self._row_end, self._last_row_end = piece("\n"), piece("\n\n")
        self._opening, self._complete = piece(_OPENING), piece(_COMPLETE) + visual
        longest = self._image_part((tiles_per_side, tiles_per_side))
        self._start = id_bytes(longest)
        # The opening and the markers of the complete image are counted as text, as without tiling.
        markers = len(piece(BEFORE_IMAGE))
        self.layout = PromptLayout(len(self._opening), len(longest) - markers, self.layout.text_tokens)

    def encode_tiled(
        self, listings: Sequence[Mapping[str, str]], grids: Sequence[tuple[int, int]]
    ) -> list[EncodedPrompt]:
        """Encode listings whose images have these rows and columns of tiles."""
        return self.encode_all(listings, [id_bytes(self._image_part(grid)) for grid in grids])

    def _image_part(self, grid: tuple[int, int]) -> list[int]:
        rows, columns = grid
        part = list(self._opening)
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                part += self._tiles[row, column]
            part += self._row_end if row < rows else self._last_row_end
        return part + self._complete
