"""The architecture: layers, adapters, no import cycles, no torch on a login node, readable sizes."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rating_train.cli import VERBS
from tests.helpers.cli import fresh_python
from tests.repo.conftest import REPO

pytestmark = pytest.mark.timeout(60)

PACKAGE = "rating_train"

#: Layer of every package and module directly under rating_train/. A module imports only lower layers, and its own
#: package. A new name must be put here: which layer it is in is a decision.
LAYERS: dict[int, str] = {
    0: "errors log run_dir processes",
    1: "config distributed files row_files extensions",
    2: "shards scoring checkpoint resilience",
    3: "prepare data model demo",
    4: "engine weights",
    5: "training",
    6: "reports cluster prediction evaluation export bench features",
    7: "commands",
    8: "cli __main__",
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names.split()}

#: Imports within one layer that are meant: (importer, imported).
SAME_LAYER = {
    ("row_files", "files"),  # a row is appended as files are written: again after a transient error
    ("config", "files"),  # a configuration is read again after a transient error
    ("config", "extensions"),  # a setting may name what an extension adds
    ("export", "prediction"),  # an export is compared with what the checkpoint predicts
    ("demo", "model"),  # the tiny model is a model
    ("__main__", "cli"),
}

#: Dependency -> the only modules that may import it (a trailing dot opens a whole package).
ADAPTERS: dict[str, tuple[str, ...]] = {
    "streaming": ("data.samples.streaming_dataset",),
    "deepspeed": ("engine.", "checkpoint.deepspeed_io"),
    "transformers": (
        "model.attention",
        "model.backbones",
        "model.architecture",
        "model.load",
        "data.prompt",
        "export.hub.",
        "export.reload",
    ),
    "bitsandbytes": ("engine.eightbit",),
    "onnx": ("export.onnx_graph",),
    "onnxruntime": ("export.onnx_graph",),
    "onnxscript": ("export.onnx_graph",),
    "aiohttp": ("prepare.images.http_client",),
    "wandb": ("training.trackers.wandb_run",),
    "mlflow": ("training.trackers.mlflow_run",),
    "jinja2": ("reports.page.render",),
    "sklearn": ("evaluation.baselines",),
    "pyarrow": ("prepare.tables.",),
    "yarl": ("prepare.images.http_client",),
    "duckdb": ("prepare.plan.planner", "prepare.tables.parquet", "prediction.output"),
}

#: Modules and packages (with a trailing dot: all of it) that import no torch when they are imported, themselves or
#: through others: a login node runs them.
TORCH_FREE = (
    "cli errors files log processes run_dir commands. config. demo. prepare. reports. resilience.run_lock "
    "scoring. shards. cluster.site cluster.submission checkpoint.store data.samples.remote data.samples.shard_cache "
    "data.lengths data.features.identity data.workers.memory_need model.architecture model.cost "
    "distributed.gpus training.provenance export.options prediction.options prediction.output prediction.rows "
    "prediction.work_dir bench.result evaluation.baselines evaluation.gate evaluation.stored evaluation.text "
    "model.accounting "
).split()

READS_ENVIRONMENT = {
    "distributed.world",
    "log",
    "cluster.site",
}  # the last: where the site's settings are

MAX_MODULES = 12
#: Folders that may hold more, with the reason.
FLAT_FOLDERS = {"rating_train/commands": "one thin module for each verb"}
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
#: Longer files, with the length that they may have: none may grow.
LONG_FILES: dict[str, int] = {}


@dataclass(frozen=True)
class Import:
    """One imported module. ``typing_only``: under ``if TYPE_CHECKING``."""

    target: str
    line: int
    typing_only: bool


def name_of(path: Path) -> str:
    """``catalogue.sources`` of rating_train/prepare/records/sources.py; ``data`` of rating_train/data/__init__.py."""
    parts = list(path.relative_to(REPO / PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


FILES = {name_of(p): p for p in sorted((REPO / PACKAGE).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}


def imports(tree: ast.AST, typing_only: bool = False) -> Iterator[Import]:
    """All imports of a module, also those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, typing_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, typing_only)
        else:
            checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            yield from imports(node, typing_only or checking)


def resolve(target: str) -> str | None:
    """The package's module that ``target`` (a module, or a name in one) lies in; ``None`` for others."""
    if target != PACKAGE and not target.startswith(PACKAGE + "."):
        return None
    inner = target.removeprefix(PACKAGE).lstrip(".")
    while inner not in FILES:
        inner = inner.rpartition(".")[0]
    return inner  # "" is rating_train/__init__.py, which holds the version only


def internal(name: str) -> list[tuple[str, int]]:
    """(module, line) of every import that one module has of the package, typing included."""
    found = ((resolve(i.target), i.line) for i in imports(TREES[name]))
    return [(target, line) for target, line in found if target]


INTERNAL = {name: internal(name) for name in FILES if name}
top = lambda name: name.partition(".")[0]  # noqa: E731


def test_every_module_has_a_layer() -> None:
    unknown = sorted({top(name) for name in FILES if name} - set(LAYER))
    gone = sorted(set(LAYER) - {top(name) for name in FILES})
    assert not unknown, f"give them a layer in LAYERS: {unknown}"
    assert not gone, f"take them out of LAYERS: {gone}"


def test_imports_go_down_only() -> None:
    wrong = []
    for name, targets in INTERNAL.items():
        for target, line in targets:
            a, b = top(name), top(target)
            if a == b or LAYER[b] < LAYER[a] or (a, b) in SAME_LAYER:
                continue
            wrong.append(f"{FILES[name]}:{line}: {name} (L{LAYER[a]}) imports {target} (L{LAYER[b]})")
    assert not wrong, "\n".join(wrong)


def test_the_exceptions_are_used() -> None:
    real = {(top(name), top(target)) for name, targets in INTERNAL.items() for target, _ in targets}
    assert real >= SAME_LAYER, f"not needed any more: {SAME_LAYER - real}"


def test_no_verb_imports_a_verb() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in INTERNAL.items()
        if top(name) == "commands"
        for target, _ in targets
        if target.removeprefix("commands.") in VERBS and target != name
    ]
    assert not wrong


def test_one_verb_is_one_module() -> None:
    modules = {name.removeprefix("commands.") for name in FILES if name.startswith("commands.")}
    assert set(VERBS) == modules - {"shared"}


def test_no_folder_is_crowded() -> None:
    folders = Counter(path.parent for path in FILES.values() if path.name != "__init__.py")
    named = {str(folder.relative_to(REPO)): n for folder, n in folders.items()}
    wrong = {name: n for name, n in named.items() if n > MAX_MODULES and name not in FLAT_FOLDERS}
    assert not wrong, f"more than {MAX_MODULES} modules side by side: {wrong}"


def test_no_circles() -> None:
    state: dict[str, str] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != "open", " -> ".join([*path[path.index(name) :], name])
        if name in state:
            return
        state[name] = "open"
        for target, _ in INTERNAL[name]:
            if target != name:
                visit(target, (*path, name))
        state[name] = "done"

    for name in INTERNAL:
        visit(name, ())


@pytest.mark.parametrize("dependency", ADAPTERS)
def test_one_dependency_one_adapter(dependency: str) -> None:
    wrong = [
        f"{FILES[name]}:{i.line}"
        for name, tree in TREES.items()
        for i in imports(tree)
        if i.target.partition(".")[0] == dependency
        and not any(
            name == adapter or (adapter.endswith(".") and name.startswith(adapter))
            for adapter in ADAPTERS[dependency]
        )
    ]
    assert not wrong, f"{dependency} outside {', '.join(ADAPTERS[dependency])}: {wrong}"


def is_torch_free(name: str) -> bool:
    return any(name == entry or (entry.endswith(".") and name.startswith(entry)) for entry in TORCH_FREE)


def test_every_entry_of_torch_free_exists() -> None:
    gone = [
        e
        for e in TORCH_FREE
        if not any(name == e or (e.endswith(".") and name.startswith(e)) for name in FILES)
    ]
    assert not gone


def test_a_login_node_loads_no_torch() -> None:
    modules = [f"{PACKAGE}.{name}" for name in FILES if is_torch_free(name)]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'deepspeed', 'streaming', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} brings in {heavy}'\n"
    )
    fresh_python(program)


def test_the_environment_is_read_in_few_places() -> None:
    wrong = []
    for name, tree in TREES.items():
        if name in READS_ENVIRONMENT:
            continue
        for node in ast.walk(tree):
            attribute = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
            imported = isinstance(node, ast.ImportFrom) and node.module == "os"
            if attribute or (imported and {a.name for a in node.names} & {"environ", "getenv", "putenv"}):
                wrong.append(f"{FILES[name]}:{node.lineno}")
    assert not wrong, f"only {sorted(READS_ENVIRONMENT)} read the environment: {wrong}"


def test_nothing_of_the_hub_is_trusted_to_run() -> None:
    """But an export's own code, just written, by the process that checks it."""
    trusting = [name for name, path in FILES.items() if "trust_remote_code" in path.read_text("utf-8")]
    assert trusting == ["export.reload"]


def test_files_are_of_a_readable_size() -> None:
    sizes = {name: len(path.read_text("utf-8").splitlines()) for name, path in FILES.items()}
    wrong = {n: size for n, size in sizes.items() if size > LONG_FILES.get(n, MAX_FILE_LINES)}
    assert not wrong, f"more than {MAX_FILE_LINES} lines: {wrong}"
    short = {n for n in LONG_FILES if sizes.get(n, 0) <= MAX_FILE_LINES}
    assert not short, f"take them out of LONG_FILES: {short}"


def test_functions_are_of_a_readable_size() -> None:
    wrong = [
        f"{FILES[name]}:{node.lineno} {node.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not wrong, f"more than {MAX_FUNCTION_LINES} lines: {wrong}"
