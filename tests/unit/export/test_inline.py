"""Modules made self-contained: they run without the package, and are what the package runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from rating_train.export import inline
from rating_train.export.inline import self_contained

MODULES = ("configuration_rating", "modeling_rating", "processing_rating")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_of_the_package_is_imported(module: str) -> None:
    source = self_contained(f"rating_train.export.hub.{module}")
    imported = [
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not [name for name in imported if name.startswith("rating_train")]
    # What stands in a `try` is done without where it is missing; transformers leaves it out of its check as well.
    optional = {
        node.names[0].name.partition(".")[0]
        for block in ast.walk(ast.parse(source))
        if isinstance(block, ast.Try) and "ImportError" in ast.unparse(block.handlers[0])
        for node in block.body
        if isinstance(node, ast.Import)
    }
    others = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) - optional
    assert others <= {"torch", "transformers", "tokenizers", "numpy", "PIL", *MODULES}, "no other dependency"


@pytest.mark.parametrize("module", MODULES)
def test_every_name_is_defined(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(self_contained(f"rating_train.export.hub.{module}"))
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_definitions_are_copied_once_and_before_their_use() -> None:
    source = self_contained("rating_train.export.hub.modeling_rating")
    defined = [n.name for n in ast.parse(source).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    assert len(defined) == len(set(defined))
    assert defined.index("RatingHead") < defined.index("RatingRegressor") < defined.index("RatingModel")
    assert "load_backbone" not in defined, "what is not used is not copied"


def test_a_name_with_two_definitions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rating_train_copies"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def same():\n    return 1\n\n\ndef f():\n    return same()\n")
    (package / "b.py").write_text("def same():\n    return 2\n\n\ndef g():\n    return same()\n")
    imports = "from rating_train_copies.a import f\nfrom rating_train_copies.b import g\n"
    (package / "c.py").write_text(f'"""Doc."""\n{imports}\n\ndef h():\n    return f() + g()\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(inline, "_PACKAGE", "rating_train_copies")
    with pytest.raises(ValueError, match=r"same is defined differently in rating_train_copies\.a and in"):
        self_contained("rating_train_copies.c")
