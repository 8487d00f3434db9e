"""The pages of the project, and what several tests read from them."""

from __future__ import annotations

import re

from tests.repo.conftest import REPO

#: Path -> text of every page: README, CONTRIBUTING and docs/.
PAGES = {
    str(path.relative_to(REPO)): path.read_text("utf-8")
    for path in [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
}


#: Sections of the README that are followed as they stand, by test_recipes.py and tests/slurm/test_readme_recipe.py.
RECIPES = ("Recipe 1: my CSV on this machine", "Recipe 2: one machine with GPUs", "Recipe 3: a Slurm cluster")


def command_lines(text: str) -> list[str]:
    """The command lines of every ```bash block, in order; a line that ends in a backslash continues in the next."""
    lines: list[str] = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S):
        joined = block.replace("\\\n", " ")
        lines += [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return lines


def section(page: str, title: str) -> str:
    """The text of ``page`` below the heading ``title``, up to the next heading of the same level."""
    return PAGES[page].split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every row of the tables in ``text``, without header and rule."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rules = [i for i, row in enumerate(cells) if all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]
