"""The language of docs/style.md: words that sound translated are not published, in code, messages or pages."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.repo.conftest import REPO
from tests.repo.pages import PAGES

#: Pattern -> the word to use. `border` is allowed as a property of CSS.
WORDS = {
    r"\bthe house\b": "architecture, the project",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\b(go|goes|going|went) on\b": "continue, resume",
    r"\bborders?\b(?![-:])": "boundary",
    r"\bloader process(es)?\b": "DataLoader worker",
    r"\bsquashed\b": "resized without keeping the aspect ratio",
    r"\bwhat stands around\b": "supervision",
    r"\bmake room\b": "free some disk space",
    r"\bgive the same command again\b": "run the same command again",
    r"^(#+|\"{3}) ?What holds\b": "guarantees",
}
#: Where the words are quoted as what not to say.
QUOTED = ("docs/style.md", "tests/repo/test_style.py")
TEXTS = (".py", ".md", ".sh", ".sbatch", ".yaml", ".cfg", ".toml", ".example", ".c")


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git checkout: its files are not known")
    names = [name for name in listed.stdout.splitlines() if name.endswith(TEXTS) and name not in QUOTED]
    return [name for name in names if (REPO / name).is_file()]


def found_in(text: str) -> list[str]:
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}, say: {instead}"
        for pattern, instead in WORDS.items()
        for match in re.finditer(pattern, text, flags=re.I | re.M)
    ]


def test_no_file_uses_a_word_of_the_list() -> None:
    wrong = [f"{name}:{line}" for name in tracked() for line in found_in((REPO / name).read_text("utf-8"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "sentence",
    [
        "The run goes on.",
        "Mended in 2.1",
        "the next step border",
        "a loader process died",
        "Make room, then retry",
    ],
)
def test_the_list_finds_what_it_is_for(sentence: str) -> None:
    assert found_in(sentence)


@pytest.mark.parametrize(
    "sentence", ["td { border: 1px }", "border-collapse: collapse", "an amendment", "recommended"]
)
def test_the_list_spares_what_only_looks_alike(sentence: str) -> None:
    assert not found_in(sentence)


def test_the_style_page_has_its_pairs() -> None:
    pairs = re.findall(r"^\| \d+ \| (.+?) \| (.+?) \| (.+?) \|$", PAGES["docs/style.md"], flags=re.M)
    assert len(pairs) == 10 and all(before != after for before, after, _ in pairs)
