"""A loss of the user's own: what is refused before anything is trained, and what a good one computes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rating_train.config.load import config_from_dict
from rating_train.config.schema import LossConfig
from rating_train.errors import UserError
from rating_train.files import sha256_file
from rating_train.model.custom_loss import CustomLoss, load_custom_loss
from rating_train.model.loss import rating_loss

Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes my_losses.py into the current directory; nothing of it stays imported."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield lambda content: (tmp_path / "my_losses.py").write_text(f"import torch\n{content}") and None
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("my_losses", "my_package"):
            del sys.modules[name]


def load(kind: str = "my_losses:f", **settings: object) -> CustomLoss:
    loss = load_custom_loss(LossConfig(kind=kind, **settings))  # type: ignore[arg-type]
    assert loss is not None
    return loss


def test_one_of_the_current_directory_and_one_of_a_package(write: Write, tmp_path: Path) -> None:
    write("def f(scores, ratings, rating_counts):\n    return (scores - ratings) ** 2\n")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "inner.py").write_text(
        "from my_losses import f\n\ndef g(s, r, n):\n    return f(s, r, n)\n"
    )
    for kind, file in (("my_losses:f", "my_losses.py"), ("my_package.inner:g", "my_package/inner.py")):
        loss = load(kind)
        assert loss.facts() == {
            "kind": kind,
            "file": str((tmp_path / file).resolve()),
            "sha256": sha256_file(tmp_path / file),
        }


def test_a_loss_per_item_is_weighted_and_averaged_as_a_built_in_one(write: Write) -> None:
    write("def f(scores, ratings, rating_counts):\n    return (scores - ratings) ** 2\n")
    generator = torch.Generator().manual_seed(3)
    ratings, counts = 1 + 4 * torch.rand(7, generator=generator), 100 * torch.rand(7, generator=generator)
    function = load().function
    for settings in ({}, {"count_weight": "log"}, {"count_weight": "sqrt", "plcc_weight": 0.5}):
        found = []
        for kind, custom in (("mse", None), ("my_losses:f", function)):
            scores = (1 + 4 * torch.rand(7, generator=torch.Generator().manual_seed(4))).requires_grad_()
            value = rating_loss(scores, ratings, counts, LossConfig(kind=kind, **settings), custom)  # type: ignore[arg-type]
            found.append((value, *torch.autograd.grad(value, scores)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_scalar_is_taken_as_it_is(write: Write) -> None:
    write("def f(scores, ratings, rating_counts):\n    return (scores - ratings).abs().max()\n")
    scores, ratings = torch.tensor([4.0, 2.0, 3.0]), torch.tensor([4.0, 4.5, 3.5])
    assert float(rating_loss(scores, ratings, ratings, LossConfig("my_losses:f"), load().function)) == 2.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"my_losses has no function 'f'.*expected: def my_loss\(scores, ratings, rating_counts\)"),
        ("f = 3", "my_losses is not a function: 'f'"),
        ("def f(scores, ratings): return scores", "cannot be called with three arguments.*too many positional"),
        ("def f(a, b, c, d): return a", r"cannot be called with three arguments \(missing a required argument: 'd'"),
        ("def f(a, b, c)", r"my_losses cannot be imported \(SyntaxError: .*correct the file"),
        ("raise SystemExit(3)", r"cannot be imported \(SystemExit: 3, .*my_losses.py:2\)"),
        ("import no_such_thing", r"my_losses cannot be imported \(ModuleNotFoundError: .*no_such_thing"),
        ("def f(a, b, c): return a @ torch.ones(3)", r"fails on two items \(RuntimeError: .*my_losses.py:2\)"),
        ("def f(a, b, c): return 1.0", "it returns float, not a tensor"),
        ("def f(a, b, c): return (a - b).double()", "it returns float64, not float32"),
        ("def f(a, b, c): return (a - b)[:, None]", r"it returns shape \(2, 1\) for 2 items"),
        ("def f(a, b, c): return b", "does not depend on the scores"),
        ("def f(a, b, c): return a.detach() - b", "does not depend on the scores"),
        ("def f(a, b, c): return a / (b - b)", "for two ordinary items, which is not finite"),
        ("def f(a, b, c): return ((a - a) ** 0.5) * b", "its gradient .* is not finite"),
    ],
)  # fmt: skip
def test_what_does_not_fulfil_the_contract_is_one_error(write: Write, content: str, message: str) -> None:
    write(content)
    with pytest.raises(UserError, match=message) as error:
        load()
    assert "where: loss.kind=my_losses:f" in str(error.value) and "\n" not in str(error.value)


def test_a_module_that_is_not_there_is_told_from_one_that_fails(write: Write, tmp_path: Path) -> None:
    for kind in ("no_such_module:f", "my_losses.py:f"):
        with pytest.raises(
            UserError, match=rf"there is no module .*a file losses.py in {tmp_path} is `losses:FUNC"
        ):
            load(kind)


def test_a_scalar_cannot_be_weighted_by_counts(write: Write) -> None:
    write("def f(a, b, c): return (a - b).abs().mean()")
    with pytest.raises(UserError, match=r"loss\.count_weight=log can weigh no item"):
        load(count_weight="log")


def test_a_result_of_another_shape_in_training_is_named(write: Write) -> None:
    write("def f(a, b, c): return a - b if len(a) == 2 else (a - b)[1:]")
    scores = torch.tensor([4.0, 2.0, 3.0])
    with pytest.raises(UserError, match=r"returns shape \(2,\) for 3 items"):
        rating_loss(scores, scores, scores, LossConfig("my_losses:f"), load().function)


@pytest.mark.parametrize("kind", ["mea", "my_losses", "my_losses:", ":f", "../x:f", "a b:f", "x:f()", ""])
def test_a_kind_that_names_nothing_is_refused_with_the_configuration(kind: str) -> None:
    with pytest.raises(UserError, match=r"`loss\.kind` is .*expected mse, huber, or MODULE:FUNCTION"):
        config_from_dict({"loss": {"kind": kind}})


def test_the_example_of_the_page_is_one(write: Write, repo: Path) -> None:
    page = (repo / "docs/usage.md").read_text().split("\n## A loss of your own\n")[1]
    write(page.split("```python\n")[1].split("```")[0])
    function = load("my_losses:pinball").function
    found = function(torch.tensor([3.0, 5.0]), torch.tensor([4.0, 4.0]), torch.ones(2))
    assert found.tolist() == pytest.approx([0.7, 0.3])


def test_a_built_in_one_is_nothing_to_load() -> None:
    assert load_custom_loss(LossConfig("huber")) is None
