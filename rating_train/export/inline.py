"""Make a module self-contained: definitions that it imports from this package are copied into it.

An exported folder must work without this package, and must not hold a second version of the model that drifts away
from the first. So the modules in ``export/hub`` import what they need from the package like any other, and the export
writes them with the sources of those functions and classes, and of what these use in turn, in place of the imports.

What is copied are top-level definitions: functions, classes, assignments. Imports of other packages are kept, imports
of a sibling in ``export/hub`` become relative ones.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_PACKAGE = "rating_train"
_SIBLINGS = "rating_train.export.hub"


@dataclass
class _Module:
    """One module's source, and where each of its top-level names comes from."""

    name: str
    lines: list[str]
    tree: ast.Module
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, ast.Import | ast.ImportFrom] = field(default_factory=dict)


@dataclass
class _Copied:
    """What has been collected, in an order in which everything is defined before it is used."""

    imports: dict[str, None] = field(default_factory=dict)
    sections: list[tuple[str, str]] = field(default_factory=list)  # (module, source)
    names: dict[str, str] = field(default_factory=dict)  # name -> module that it was copied from


def self_contained(module: str) -> str:
    """Return the source of a module of ``export/hub`` without imports of this package.

    Args:
        module: its full name.

    Raises:
        ValueError: two different definitions would have one name, or a name cannot be resolved.
    """
    own = _parse(module)
    copied = _Copied()
    for node in ast.walk(own.tree):
        if isinstance(node, ast.Name):
            _collect_import(own, node.id, copied)
    body = [s for s in own.tree.body if not isinstance(s, (ast.Import, ast.ImportFrom)) and not _is_doc(s)]
    head = [f'"""{ast.get_docstring(own.tree, clean=False)}"""', "", "from __future__ import annotations", ""]
    text = [*head, *_import_lines(copied.imports), ""]
    for name, source in copied.sections:
        text += ["", f"# From {name.replace('.', '/')}.py", source, ""]
    for statement in body:
        text += ["", _source(own, statement), ""]
    return "\n".join(text) + "\n"


def _import_lines(collected: Iterable[str]) -> list[str]:
    """Join what comes from one module into one statement; siblings last."""
    plain, groups = [], dict[str, list[str]]()
    for line in collected:
        module, found, name = line.partition(" import ")
        if found:
            groups.setdefault(module, []).append(name)
        else:
            plain.append(line)
    joined = [f"{module} import {', '.join(sorted(names))}" for module, names in sorted(groups.items())]
    return sorted(plain) + sorted(joined, key=lambda line: line.startswith("from ."))


def _collect_import(module: _Module, name: str, copied: _Copied) -> None:
    """Collect a name that ``module`` imports, if it does."""
    statement = module.imported.get(name)
    if statement is None:
        return
    (alias,) = [a for a in statement.names if (a.asname or a.name.partition(".")[0]) == name]
    if isinstance(statement, ast.Import) or not (statement.module or "").startswith(_PACKAGE):
        kept = ast.copy_location(_only(statement, alias), statement)
        copied.imports[ast.unparse(kept)] = None
    elif (statement.module or "").startswith(_SIBLINGS + "."):
        sibling = (statement.module or "").removeprefix(_SIBLINGS)
        copied.imports[f"from {sibling} import {alias.name}"] = None
    else:
        if alias.asname:
            raise ValueError(f"{module.name} imports {alias.name} under another name, which cannot be copied")
        _collect(_parse(statement.module or ""), alias.name, copied)


def _collect(module: _Module, name: str, copied: _Copied) -> None:
    """Collect a definition and, before it, all that it uses."""
    if name in module.imported:
        _collect_import(module, name, copied)
        return
    if name not in module.defined:
        raise ValueError(f"{module.name} has no top-level definition of {name}")
    known = copied.names.get(name)
    if known is not None:
        if known != module.name and _source(_parse(known), _parse(known).defined[name]) != _source(
            module, module.defined[name]
        ):
            raise ValueError(f"{name} is defined differently in {known} and in {module.name}")
        return
    copied.names[name] = module.name  # before its uses: a function may use itself
    statement = module.defined[name]
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and node.id != name:
            if node.id in module.defined:
                _collect(module, node.id, copied)
            else:
                _collect_import(module, node.id, copied)
    source = _source(module, statement)
    if (module.name, source) not in copied.sections:  # one assignment may define several names
        copied.sections.append((module.name, source))


def _only(statement: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    if isinstance(statement, ast.Import):
        return ast.Import([alias])
    return ast.ImportFrom(statement.module, [alias], 0)


def _parse(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no module {name}")
    text = Path(spec.origin).read_text("utf-8")
    module = _Module(name, text.splitlines(), ast.parse(text))
    for statement in module.tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                continue
            for alias in statement.names:
                module.imported[alias.asname or alias.name.partition(".")[0]] = statement
        elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            module.defined[statement.name] = statement
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                module.defined |= {n.id: statement for n in ast.walk(target) if isinstance(n, ast.Name)}
    return module


def _source(module: _Module, statement: ast.stmt) -> str:
    """Return the lines of a statement, with its decorators and the comments directly above it."""
    decorators = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(d.lineno for d in decorators)]) - 1
    while first > 0 and module.lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(module.lines[first : statement.end_lineno])


def _is_doc(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
