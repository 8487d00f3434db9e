"""Several sources under one name: a folder, a pattern such as ``data/*.jsonl``, a folder that ``datasets`` saved.

The order is fixed: by name, or as the folder's own files say. So the same files give the same plan.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import read_json
from rating_train.prepare.records.sources import KINDS, kind_of_name

log = logging.getLogger(__name__)

_SPLITS_NAME, _STATE_NAME = "dataset_dict.json", "state.json"  # as `datasets` names them


def expand_sources(given: Iterable[str]) -> tuple[str, ...]:
    """Return the files that ``--source`` means, in a fixed order.

    Args:
        given: files, folders, and patterns that no shell has expanded.

    Raises:
        UserError: a folder or pattern without a source, or a saved dataset that cannot be read.
    """
    found: list[str] = []
    for source in given:
        files = _files(source)
        if files != [source]:
            log.info("%s: %d files, from %s to %s", source, len(files), files[0], files[-1])
        found += files
    return tuple(found)


def _files(source: str) -> list[str]:
    if Path(source).is_dir():
        return _folder(Path(source))
    if Path(source).exists() or not glob.has_magic(source):
        return [source]  # a missing file is reported where it is read
    matching = [name for name in sorted(glob.glob(source, recursive=True)) if Path(name).is_file()]
    if not matching:
        raise UserError("no file matches the pattern", where=source, fix="check --source")
    return matching


def _folder(folder: Path) -> list[str]:
    if (folder / _SPLITS_NAME).is_file():
        splits = _values(folder / _SPLITS_NAME, "splits")
        return [file for split in splits for file in _folder(folder / _inside(folder, split))]
    if (folder / _STATE_NAME).is_file():
        return _saved(folder)
    names = sorted(
        path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith((".", "_"))
    )
    sources = [str(folder / name) for name in names if kind_of_name(name)]
    if not sources:
        raise UserError("the folder holds no source", where=folder, expected=KINDS)
    return sources


def _saved(folder: Path) -> list[str]:
    """Return the files of a dataset that ``save_to_disk`` wrote, in the order of its rows."""
    state = folder / _STATE_NAME
    files = [str(folder / _inside(folder, entry.get("filename"))) for entry in _values(state, "_data_files")]
    if any(value for key, value in read_json(state).items() if "indices" in key):
        raise UserError(
            "the saved dataset selects rows by an index, as old versions of `datasets` wrote it",
            where=folder,
            fix="save it again: load_from_disk(FOLDER).flatten_indices().save_to_disk(NEW)",
        )
    if not files:
        raise UserError("the saved dataset has no files", where=folder, fix="save it again")
    return files


def _values(file: Path, key: str) -> list[Any]:
    values = read_json(file).get(key)
    if not isinstance(values, list):
        raise UserError(f"no list {key!r} is in it", where=file, fix="save the dataset again")
    return values


def _inside(folder: Path, name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{name!r} is not the name of a file or folder in it", where=folder)
    return name
