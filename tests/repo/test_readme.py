"""The README: what a newcomer reads first is the tree as it is, and short."""

from __future__ import annotations

import re

from tests.repo.conftest import REPO
from tests.repo.pages import PAGES, section
from tests.repo.test_layers import FILES, LAYER

README = PAGES["README.md"]
MAX_LINES = 140


def test_the_first_block_is_the_quickstart_and_the_tests() -> None:
    first = re.search(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)
    assert first and first.groups() == ("bash", "bash launch/quickstart.sh\nbash launch/test.sh\n")
    assert README.index("```bash") < 30


def test_it_stays_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES, "details belong in docs/"


def tree() -> dict[str, tuple[int, str]]:
    """Packages and modules of the README's tree -> (layer, phrase); a package below another has its layer."""
    block = section("README.md", "Where things are").split("```")[1].strip().splitlines()
    assert block[0].split() == ["rating_train/", "L"]
    found: dict[str, tuple[int, str]] = {}
    outer, layer = "", 0
    for line in block[1:]:
        match = re.fullmatch(r"( +)([a-z_]+/?(?:  [a-z_]+/?)*) +(?:(\d)  )?(\S.*)", line)
        assert match, f"not a line of the tree: {line!r}"
        indent, names, number, phrase = match.groups()
        layer = int(number) if number else layer
        for name in names.replace("/", "").split():
            if len(indent) == 2:
                outer = name
            found[name if len(indent) == 2 else f"{outer}.{name}"] = (layer, phrase)
    return found


def test_the_tree_is_that_of_the_package() -> None:
    packages = {name for name, path in FILES.items() if name and path.name == "__init__.py"}
    modules = {name for name in FILES if name and "." not in name}
    assert set(tree()) == packages | modules


def test_the_layers_are_those_that_a_test_holds() -> None:
    wrong = {name: layer for name, (layer, _) in tree().items() if layer != LAYER[name.partition(".")[0]]}
    assert not wrong, f"the README's layers differ from LAYERS of tests/repo/test_layers.py: {wrong}"


def test_the_files_to_read_are_there_and_follow_a_step() -> None:
    files = re.findall(r"^\d\. `(\S+)`: \S", section("README.md", "Where things are"), flags=re.M)
    assert len(files) == 6 and files[0] == "rating_train/training/loop.py"
    assert all((REPO / path).is_file() for path in files)


def test_every_page_is_linked() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)", README))
    assert linked == {page for page in PAGES if page.startswith("docs/")}
