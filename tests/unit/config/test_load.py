"""Configuration: precedence, types, bounds, and what a configuration implies once ranks and items are known."""

from __future__ import annotations

import dataclasses
import errno
import math
import re
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from rating_train.config.load import config_from_dict, dump_config, load_config
from rating_train.config.resolve import order_fingerprint_inputs, plan_batch, source_shares, total_steps
from rating_train.config.schema import Config, to_dict
from rating_train.errors import UserError

pytestmark = pytest.mark.timeout(60)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problem(**values: Any) -> str:
    """The message of the error that these values give."""
    with pytest.raises(UserError) as error:
        config_from_dict(values)
    return str(error.value)


# ---- precedence


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "{}", "base: empty.yaml\n"])
def test_an_empty_configuration_is_refused_with_what_it_needs(tmp_path: Path, text: str) -> None:
    write(tmp_path / "empty.yaml", "")
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(
        UserError, match=r"configuration is empty.*a\.yaml.*`name: NAME` and `data: \{path: DATA\}`"
    ):
        load_config(path)
    assert load_config(path, ["name=told"]) == dataclasses.replace(Config(), name="told")


def test_defaults_base_chain_file_and_set_in_this_order(tmp_path: Path) -> None:
    write(
        tmp_path / "grand.yaml",
        "name: grand\ntrain: {epochs: 1, seed: 1, keep_last: 1}\nbatch: {global_items: 8}\n",
    )
    write(tmp_path / "sub" / "parent.yaml", "base: ../grand.yaml\ntrain: {epochs: 2, seed: 2}\n")
    path = write(tmp_path / "sub" / "child.yaml", "base: parent.yaml\ntrain: {epochs: 3}\nname: child\n")
    config = load_config(path, ["train.max_steps=9", "name=told"])
    assert config.name == "told"  # --set over the file
    assert config.train.epochs == 3  # the file over its base
    assert config.train.seed == 2  # a base over its own base
    assert config.train.keep_last == 1  # from the furthest base
    assert config.batch.global_items == 8
    assert config.train.max_steps == 9
    assert config.train.log_every_steps == Config().train.log_every_steps  # the default


def test_the_last_set_wins_and_reaches_nested_sections(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "optim: {lr: {vision: 1e-5, head: 1e-3}}\n")
    config = load_config(path, ["optim.lr.vision=1e-6", "optim.lr.vision=2e-6", "model.freeze=[connector]"])
    assert config.optim.lr.vision == 2e-6
    assert config.optim.lr.head == 1e-3
    assert config.model.freeze == ["connector"]


def test_a_list_is_replaced_not_joined(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "model: {freeze: [vision, connector]}\n")
    path = write(tmp_path / "a.yaml", "base: base.yaml\nmodel: {freeze: []}\n")
    assert load_config(path).model.freeze == []


def test_a_circle_of_bases_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: c.yaml\n")
    write(tmp_path / "c.yaml", "base: a.yaml\n")
    with pytest.raises(UserError, match="circle") as error:
        load_config(tmp_path / "a.yaml")
    for name in ("a.yaml", "b.yaml", "c.yaml"):
        assert name in str(error.value)
    with pytest.raises(UserError, match="circle"):
        load_config(write(tmp_path / "self.yaml", "base: self.yaml\n"))


def test_a_base_used_twice_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "name: base\n")
    first = write(tmp_path / "a.yaml", "base: base.yaml\n")
    second = write(tmp_path / "b.yaml", "base: base.yaml\n")
    assert load_config(first) == load_config(second)


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "base: gone.yaml\n")
    with pytest.raises(UserError, match="not found") as error:
        load_config(path)
    assert "gone.yaml" in str(error.value)


def test_what_is_saved_reads_back_equal(tmp_path: Path) -> None:
    config = config_from_dict(
        {
            "name": "a",
            "optim": {"lr": {"head": 3e-7}, "eps": 1e-12},
            "zero": {"stage": 3, "extra": {"round_robin_gradients": True}},
        }
    )
    assert load_config(write(tmp_path / "config.yaml", dump_config(config))) == config


def test_instances_do_not_share_their_lists() -> None:
    a, b = Config(), Config()
    a.model.freeze.append("vision")
    assert b.model.freeze == [] and Config().model.freeze == []


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.epochs = 3  # type: ignore[misc]


# ---- types


@pytest.mark.parametrize("text", ["1e-4", "'1e-4'", "0.0001", "1.0e-4", "1E-4"])
def test_numbers_as_yaml_may_spell_them(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.yaml", f"optim: {{lr: {{head: {text}}}}}\n")
    assert load_config(path).optim.lr.head == 1e-4
    assert load_config(write(tmp_path / "b.yaml", ""), [f"optim.lr.head={text}"]).optim.lr.head == 1e-4


def test_pyyaml_still_reads_1e_4_as_text() -> None:
    assert yaml.safe_load("1e-4") == "1e-4"  # the reason for the coercion; should this end, it may go


def test_integers_may_be_written_as_floats_without_a_fraction() -> None:
    assert config_from_dict({"train": {"max_steps": 1e3}}).train.max_steps == 1000
    assert isinstance(config_from_dict({"train": {"max_steps": 1e3}}).train.max_steps, int)
    assert "`train.max_steps` is 1.5 (float), expected a whole number" in problem(train={"max_steps": 1.5})


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("train", "seed", True, "a whole number"),
        ("train", "epochs", False, "a finite number"),
        ("train", "epochs", math.inf, "a finite number"),
        ("train", "epochs", math.nan, "a finite number"),
        ("train", "epochs", None, "a finite number"),
        ("data", "shuffle", 1, "true or false"),
        ("data", "shuffle", "yes", "true or false"),
        ("data", "path", 5, "text"),
        ("zero", "stage", True, "one of 0, 1, 2, 3"),
        ("zero", "stage", 4, "one of 0, 1, 2, 3"),
        ("zero", "extra", [], "a mapping"),
        ("model", "freeze", "vision", "a list"),
        ("model", "freeze", [3], "text"),
        ("train", "precision", "fp16", "one of bf16, fp32"),
    ],
)
def test_wrong_types_are_refused(section: str, key: str, value: Any, expected: str) -> None:
    message = problem(**{section: {key: value}})
    assert f"`{section}.{key}" in message and f"expected {expected}" in message


def test_unknown_keys_come_with_the_nearest_name_or_all_names() -> None:
    assert "unknown key `train.epoch` (did you mean `train.epochs`?)" in problem(train={"epoch": 1})
    assert "unknown key `optim.lr.haed` (did you mean `optim.lr.head`?)" in problem(optim={"lr": {"haed": 1}})
    message = problem(loss={"zzz": 1})
    assert "unknown key `loss.zzz` (known: " in message and "huber_delta" in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"train": {"epoch": 1, "seed": "x"}, "zero": {"stage": 9}, "nme": "x"},
            ("train.epoch`", "train.seed`", "zero.stage`", "nme`"),
        ),
        (  # a bound beside a wrong type, in the same section, in another one, and nested
            {"train": {"seed": "x", "epochs": 0}, "batch": {"global_items": 0}, "optim": {"lr": {"head": 2}}},
            ("train.seed`", "`train.epochs` is 0", "`batch.global_items` is 0", "`optim.lr.head` is 2"),
        ),
        (  # a rule about two settings beside a wrong type elsewhere
            {"zero": {"stage": 2, "offload_param": True}, "data": 5},
            ("`zero.offload_param` needs", "`data` is a section, not 5 (int)"),
        ),
        (
            {"model": {"freeze": ["haed", 3]}, "name": "a/b"},
            ("`model.freeze[1]` is 3 (int)", "`name` is 'a/b'"),
        ),
    ],
)
def test_all_problems_in_one_error(values: dict[str, Any], words: tuple[str, ...]) -> None:
    message = problem(**values)
    assert message.startswith(f"{len(words)} problems: ")
    for word in words:
        assert word in message
    assert "\n" not in message


def test_a_rule_about_settings_of_which_one_is_invalid_is_not_guessed() -> None:
    message = problem(zero={"stage": "x", "offload_param": True}, data={"remote": 5, "cache_limit_mb": 9})
    assert message.startswith("2 problems: ") and "needs" not in message
    assert problem(data=5, zero={"stage": 1, "offload_param": True}).startswith("2 problems: ")


def test_long_values_are_shortened(tmp_path: Path) -> None:
    message = problem(train={"seed": "x" * 5000, "y" * 5000: 1})
    assert "..." in message and len(message) < 1500


# ---- files that nobody vouches for


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "train: {seed: 1}\ndata: {path: a}\ntrain: {epochs: 1}\n",
            "line 3, column 1: the key `train` is given twice",
        ),
        ("train: {seed: 1, seed: 2}\n", "the key `seed` is given twice"),
        ("a: " + "[" * 3000, "more than 32 levels"),
        ("- " * 3000, "more than 32 levels"),
        ("zero:\n  extra:\n" + "".join(" " * i + "a:\n" for i in range(4, 300)), "more than 32 levels"),
        (
            "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
            "refers to a value that contains an alias",
        ),
        ("zero: &a {extra: *a}\n", "refers to a value that contains an alias"),
        ("a: &a 1\nb: [" + "*a, " * 200 + "]\n", "more than 100 aliases"),
        ("a: [" + "1, " * 6000 + "]\n", "more than 5000 values"),
        ("a: '" + "x" * 200_000 + "'\n", "at most 131072"),
        ("? a\n" * 30_000, "more than 5000 values"),
        ("a: " + "9" * 5000, "not a value"),
        ("a: 2001-99-99", "not a value"),
        ("a: !!python/object/apply:os.system ['true']", "is not read"),
        ("a: !!timestamp 5", "is not read"),
        ("? [1, 2]\n: 3", "unhashable"),
        ("a: b: c", "mapping values are not allowed"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \x00", "special characters"),
        (b"name: caf\xe9\n", "utf-8"),
        ("name: a\n".encode("utf-16"), "utf-8"),
        ("- a\n- b\n", "a configuration is a mapping"),
        ("5", "a configuration is a mapping"),
        ("base: [a.yaml]", "`base:` is not the path of a file"),
        ("base: " + "x" * 300, "cannot be read"),
        ("train: {seed: " + "9" * 400 + "}", "expected a whole number"),
        ("train: {epochs: .inf}", "expected a finite number"),
    ],
    ids=lambda v: None if isinstance(v, (str, bytes)) and len(v) > 40 else repr(v),
)
def test_a_hostile_file_is_one_line_and_quick(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.process_time()
    with pytest.raises(UserError) as error:
        load_config(path)
    message = str(error.value)
    assert words in message and str(tmp_path) in message
    assert "\n" not in message and len(message) < 1000
    assert time.process_time() - began < 10


def test_a_path_that_is_no_file_is_named_as_what_it_is(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path, "is a directory"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / "gone.yaml", "not found"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(path)


def test_aliases_and_merge_keys_are_read_and_share_nothing(tmp_path: Path) -> None:
    text = (
        "train: &t {seed: 1}\nzero: {extra: {a: &x {b: 1}, c: *x}}\noptim: {<<: {beta1: 0.5}, beta2: 0.9}\n"
    )
    config = load_config(write(tmp_path / "a.yaml", text), ["zero.extra.a.b=2"])
    assert (config.train.seed, config.optim.beta1, config.optim.beta2) == (1, 0.5, 0.9)
    assert config.zero.extra == {"a": {"b": 2}, "c": {"b": 1}}


@pytest.mark.parametrize(
    "text", ["zero.extra=" + "[" * 300, "zero.extra={a: 1, a: 2}", "nothing", "=3", ".=1", "a..b=1"]
)
def test_a_hostile_override_is_one_problem(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="1 problem"):
        load_config(write(tmp_path / "a.yaml", "name: a\n"), [text])


# ---- bounds


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "image_px", 8),
        ("data", "workers", -1),
        ("data", "prefetch_batches", 0),
        ("model", "head_dropout", 1.0),
        ("optim", "warmup_fraction", 1.5),
        ("optim", "beta2", 1.0),
        ("optim", "clip_norm", -1),
        ("batch", "global_items", 0),
        ("batch", "micro_items", -1),
        ("train", "epochs", 0),
        ("train", "log_every_steps", 0),
        ("train", "keep_last", 0),
    ],
)
def test_values_out_of_bounds(section: str, key: str, value: float) -> None:
    message = problem(**{section: {key: value}})
    assert re.search(rf"`{section}\.{key}` is {value:g}, expected (between|at least) [\d.]", message)


def test_settings_that_exclude_each_other() -> None:
    assert "`zero.offload_param` needs `zero.stage` 3" in problem(zero={"stage": 2, "offload_param": True})
    assert "needs `zero.stage` 1, 2 or 3" in problem(zero={"stage": 0, "offload_optimizer": True})
    every = ["vision", "connector", "decoder", "head"]
    assert "nothing would be trained" in problem(model={"freeze": every})
    assert "`model.freeze` is ['haed'], expected any of vision, connector, decoder, head" in problem(
        model={"freeze": ["haed"]}
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"freeze": ["vision"]}}, "needs `model.freeze` with vision and connector"),
        ({"data": {"remote": "s3://a/b"}}, "expected neither `data.sources` nor `data.remote`"),
        ({"data": {"sources": [{"path": "a"}], "path": ""}}, "expected neither `data.sources`"),
        ({"data": {"tiling_px": 768}}, "expected `data.tiling_px` 0"),
        ({"model": {"inputs": ["text"], "freeze": ["vision", "connector"]}}, "`model.inputs` has no image"),
        ({"zero": {"stage": 3}}, "`data.features` needs `zero.stage` 0, 1 or 2"),
    ],
)
def test_what_features_do_not_go_with(sections: dict[str, Any], message: str) -> None:
    base: dict[str, dict[str, Any]] = {
        "data": {"features": "f"},
        "model": {"freeze": ["vision", "connector"]},
    }
    config_from_dict(base)
    assert message in problem(
        **{name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    )


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden"])
def test_a_name_that_is_no_folder(name: str) -> None:
    assert "expected a plain folder name" in problem(name=name)


def test_the_defaults_are_within_bounds() -> None:
    assert config_from_dict({}) == Config() == config_from_dict(to_dict(Config()))


# ---- the batch plan


@pytest.mark.parametrize(
    ("global_items", "micro", "ranks", "expected"),
    [(64, 0, 4, (16, 1)), (64, 8, 4, (8, 2)), (64, 1, 1, (1, 64)), (64, 64, 1, (64, 1)), (6, 3, 1, (3, 2))],
)
def test_global_is_ranks_times_micro_times_accumulation(
    global_items: int, micro: int, ranks: int, expected: tuple[int, int]
) -> None:
    plan = plan_batch(global_items, micro, ranks)
    assert (plan.micro_items, plan.accumulation) == expected
    assert plan.ranks * plan.micro_items * plan.accumulation == plan.global_items == global_items
    assert plan.rank_items * ranks == global_items


def test_a_global_batch_that_does_not_divide_lists_what_does() -> None:
    with pytest.raises(UserError) as error:
        plan_batch(64, 0, 3)
    message = str(error.value)
    assert "64 items does not divide over 3 ranks" in message
    assert "1, 2, 4, 8, 16, 32, 64 ranks" in message
    assert "batch.global_items=63 or 66" in message
    for suggestion in (63, 66):
        plan_batch(suggestion, 0, 3)


def test_more_ranks_than_items_suggests_no_empty_batch() -> None:
    with pytest.raises(UserError) as error:
        plan_batch(2, 0, 4)
    assert "batch.global_items=4," in str(error.value)


def test_a_micro_batch_that_does_not_divide_lists_what_does() -> None:
    with pytest.raises(UserError) as error:
        plan_batch(24, 5, 2)
    message = str(error.value)
    assert "rank batch of 12 items (24 over 2 ranks)" in message
    assert "one of 1, 2, 3, 4, 6, 12" in message and "batch.micro_items=4" in message


def test_a_micro_batch_larger_than_the_rank_batch() -> None:
    with pytest.raises(UserError) as error:
        plan_batch(24, 16, 2)
    assert "batch.micro_items=0" in str(error.value)


@pytest.mark.parametrize("global_items", range(1, 25))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_plan_is_exact_or_refused(global_items: int, ranks: int) -> None:
    for micro in range(global_items + 2):
        try:
            plan = plan_batch(global_items, micro, ranks)
        except UserError:
            continue
        assert plan.ranks * plan.micro_items * plan.accumulation == global_items
        assert micro in (0, plan.micro_items)


# ---- steps and fingerprints


@pytest.mark.parametrize(
    ("epochs", "items", "batch", "limit", "expected"),
    [
        (1, 100, 10, 0, 10),
        (1, 101, 10, 0, 11),  # the last batch is filled up from the next epoch
        (5, 101, 10, 0, 51),
        (0.5, 100, 10, 0, 5),
        (0.3, 100, 10, 0, 3),  # 0.3 * 100 / 10 is a hair above 3 in floating point
        (5, 100, 10, 7, 7),
        (1, 100, 10, 1000, 10),  # a limit above the epochs does not lengthen the run
        (0.001, 100, 64, 0, 1),
    ],
)
def test_total_steps(epochs: float, items: int, batch: int, limit: int, expected: int) -> None:
    config = config_from_dict(
        {"train": {"epochs": epochs, "max_steps": limit}, "batch": {"global_items": batch}}
    )
    assert total_steps(config, items) == expected


TWO = [{"path": "a", "weight": 7}, {"path": "b", "weight": 3, "remote": "s3://bucket/b", "cache_limit_mb": 9}]


def test_several_sources_take_the_place_of_the_path() -> None:
    config = config_from_dict({"data": {"sources": TWO, "predownload_items": 5}})
    assert config.data.path == "" and config.data.is_remote
    assert [s.path for s in config.data.train_sources] == ["a", "b"] and config.data.eval_source.path == "a"
    assert source_shares(config.data.sources) == [Fraction(7, 10), Fraction(3, 10)]
    again = config_from_dict(yaml.safe_load(dump_config(config)))
    assert again == config
    one = config_from_dict({"data": {"path": "c", "eval_path": "e"}}).data
    assert [s.path for s in one.train_sources] == ["c"] and one.eval_source.path == "e"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "a", "sources": TWO}, "`data.path` and `data.sources` are both given"),
        ({"path": ""}, "neither `data.path` nor `data.sources` is given"),
        ({"sources": [{"weight": 1}]}, "`data.sources`: one has no `path`"),
        ({"sources": [TWO[0], TWO[0]]}, "`data.sources`: two have the same `path`"),
        ({"sources": [{"path": "a", "weight": 0}]}, "`data.sources[0].weight` is 0"),
        ({"sources": [{"path": "a", "weigth": 1}]}, "did you mean `data.sources[0].weight`?"),
        ({"sources": {"path": "a"}}, "`data.sources` is {'path': 'a'} (dict), expected a list"),
        ({"sources": ["a"]}, "`data.sources[0]` is a section, not 'a' (str)"),
        ({"sources": TWO, "remote": "/r"}, "are given beside `data.sources`"),
        ({"sources": [{"path": "a", "remote": "ftp://x"}]}, "`data.sources`: a `remote` is not s3://"),
        ({"sources": [{"path": "a", "cache_limit_mb": 9}]}, "`data.cache_limit_mb` needs `data.remote`"),
        (
            {"sources": [{"path": "a"}], "predownload_items": 9},
            "`data.predownload_items` needs `data.remote`",
        ),
    ],
)
def test_sources_that_make_no_sense_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config_from_dict({"data": data})


def test_the_order_of_a_mixture_is_tied_to_shares_and_datasets_and_not_to_places() -> None:
    def inputs(sources: list[dict[str, Any]], fingerprints: list[str]) -> dict[str, object]:
        return order_fingerprint_inputs(config_from_dict({"data": {"sources": sources}}), fingerprints)

    reference = inputs(TWO, ["d", "e"])
    assert reference["weights"] == ["7/10", "3/10"] and reference["data_fingerprint"] == ["d", "e"]
    assert inputs([{"path": "x", "weight": 0.7}, {"path": "y", "weight": 0.3}], ["d", "e"]) == reference
    assert inputs(TWO, ["e", "d"]) != reference
    assert inputs([{"path": "a"}, {"path": "b"}], ["d", "e"]) != reference


def test_the_order_is_tied_to_what_decides_it_and_to_nothing_else() -> None:
    reference = order_fingerprint_inputs(Config(), ["d"])
    assert order_fingerprint_inputs(Config(), ["e"]) != reference
    for change in (
        {"data": {"shuffle_seed": 1}},
        {"data": {"shuffle": False}},
        {"data": {"num_canonical_nodes": 2}},
        {"data": {"shuffle_block_samples": 7}},
        {"batch": {"global_items": 32}},
    ):
        assert order_fingerprint_inputs(config_from_dict(change), ["d"]) != reference
    for change in (
        {"data": {"workers": 0, "prefetch_batches": 1}},
        {"batch": {"micro_items": 4}},
        {"zero": {"stage": 3}},
        {"train": {"epochs": 1}},
        {"optim": {"clip_norm": 0}},
    ):
        assert order_fingerprint_inputs(config_from_dict(change), ["d"]) == reference


def test_a_file_system_that_is_away_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run reads its own config.yaml when it resumes, on the disk that its checkpoints are on."""
    (tmp_path / "run.yaml").write_text("name: x\ndata: {path: data}\n")
    failures = [OSError(errno.ESTALE, "stale"), OSError(errno.EIO, "away")]
    read = Path.read_text

    def flaky(path: Path, *options: Any) -> str:
        if failures:
            raise failures.pop()
        return read(path, *options)

    monkeypatch.setattr(Path, "read_text", flaky)
    assert load_config(tmp_path / "run.yaml").name == "x" and not failures
