"""Prompts: one fixed length, the image at one constant place, and no listing can break the template."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from rating_train.data.prompt import (
    END,
    SPECIAL_TOKENS,
    EncodedPrompt,
    PromptEncoder,
    fit_lengths,
    load_tokenizer,
)
from rating_train.demo.tokenizer import IMAGE_TOKEN_ID, PAD_TOKEN_ID, make_tokenizer
from rating_train.errors import UserError
from rating_train.prepare.records.sources import read_source
from rating_train.shards.schema import TEXT_FIELDS

V, TEXT = 16, 240
TEXTS = ["Sturdy red kettle, Model K01", "A toaster for two slices of bread", "Home & Kitchen", "Wobbly lamp"]
LISTING = {
    "title": "Sturdy red kettle",
    "description": "Boils water for tea.",
    "features": "One litre. Red.",
    "main_category": "Home & Kitchen",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(TEXTS * 5, folder, vocab_size=400)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> PromptEncoder:
    return PromptEncoder(tokenizer, V, TEXT, field_chars=100)


def listing(**fields: str) -> dict[str, str]:
    return {**dict.fromkeys(TEXT_FIELDS, ""), **fields}


def text_of(tokenizer: Tokenizer, prompt: EncodedPrompt) -> str:
    ids = [i for i in prompt.ids[: prompt.used].tolist() if i != tokenizer.token_to_id("<image>")]
    return tokenizer.decode(ids, skip_special_tokens=False)


ODD_TEXTS = {
    "plain": LISTING,
    "all empty": listing(),
    "only spaces": listing(title="   ", features="\n\t "),
    "emoji": listing(title="🫖🔥 kettle 👩‍👩‍👧 🇮🇳", features="⭐" * 90),
    "chinese": listing(title="红色电热水壶 一升", description="烧水泡茶。" * 30, main_category="家居与厨房"),
    "control characters": listing(title="a\x00b\u200b\ufeffc\u202ed"),
    "long": listing(
        title="x" * 5000, description="word " * 5000, features="y" * 5000, main_category="z" * 5000
    ),
    "special tokens": listing(title="<image>" * 10, description="<end_of_utterance><|im_end|><global-img>"),
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_every_listing_has_the_same_length_and_its_image_at_the_same_place(
    tokenizer: Tokenizer, encoder: PromptEncoder, name: str
) -> None:
    prompt = encoder.encode(ODD_TEXTS[name])
    assert prompt.ids.shape == (V + TEXT,) == (encoder.layout.length,) and prompt.ids.dtype == np.int64
    start = encoder.layout.image_start
    assert np.flatnonzero(prompt.ids == IMAGE_TOKEN_ID).tolist() == list(range(start, start + V))
    assert 0 < prompt.used <= V + TEXT
    assert prompt.ids[prompt.used - 1] == tokenizer.token_to_id(END)
    assert (prompt.ids[prompt.used :] == PAD_TOKEN_ID).all()
    assert (prompt.ids[: prompt.used] != PAD_TOKEN_ID).all(), "padding only on the right"
    for token in ("<global-img>", END):
        assert (prompt.ids == tokenizer.token_to_id(token)).sum() == 1
    assert (prompt.ids == tokenizer.token_to_id("<fake_token_around_image>")).sum() == 2


def test_the_template_reads_as_the_recipe_says(tokenizer: Tokenizer, encoder: PromptEncoder) -> None:
    assert text_of(tokenizer, encoder.encode(LISTING)) == (
        "<|im_start|>User:<fake_token_around_image><global-img><fake_token_around_image>"
        "The average user rating of this product, from 1 to 5 stars, given its image and its metadata."
        " Title: Sturdy red kettle, Description: Boils water for tea., Features: One litre. Red.,"
        " Category: Home & Kitchen<end_of_utterance>"
    )


def test_empty_fields_leave_the_template_alone(tokenizer: Tokenizer, encoder: PromptEncoder) -> None:
    prompt = encoder.encode(listing())
    assert text_of(tokenizer, prompt).endswith(
        " Title:, Description:, Features:, Category:<end_of_utterance>"
    )
    assert prompt.used == V + TEXT - encoder.field_budget and prompt.cut == 0


def test_the_text_of_a_special_token_in_a_listing_is_plain_text(
    tokenizer: Tokenizer, encoder: PromptEncoder
) -> None:
    for token in SPECIAL_TOKENS:
        prompt = encoder.encode(listing(title=f"a {token} b", features=token))
        plain = encoder.encode(listing())
        number = tokenizer.token_to_id(token)
        assert (prompt.ids[: prompt.used] == number).sum() == (plain.ids[: plain.used] == number).sum()
        assert f"Title: a {token} b, Description:" in text_of(tokenizer, prompt), (
            "and it is still there to read"
        )


@pytest.mark.parametrize(
    "title", ["🫖🔥 kettle 👩‍👩‍👧 ok", "红色电热水壶 一升", "Théière émaillée ½ l", "чайник"]
)
def test_text_of_any_script_survives(tokenizer: Tokenizer, encoder: PromptEncoder, title: str) -> None:
    assert f" Title: {title}, Description:" in text_of(tokenizer, encoder.encode(listing(title=title)))


def test_a_field_is_cut_to_l_characters_and_a_character_is_not_a_byte(tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(tokenizer, V, 400, field_chars=10)
    for text in ("0123456789ABCDEF", "红色电热水壶一升装的很好", "🫖" * 15):
        shown = text_of(tokenizer, encoder.encode(listing(title=f"  {text}")))
        assert f" Title: {text[:10]}, Description:" in shown
    assert " Title: 012345678, D" in text_of(tokenizer, encoder.encode(listing(title="012345678 A")))


def test_tokens_that_do_not_fit_are_cut_from_the_longest_field_and_counted(tokenizer: Tokenizer) -> None:
    wide = PromptEncoder(tokenizer, V, 600, field_chars=100)
    template = 600 - wide.field_budget
    narrow = PromptEncoder(tokenizer, V, template + 20, field_chars=100)
    fields = listing(title="Sturdy red kettle", features="qzjxv" * 20)
    loose, tight = wide.encode(fields), narrow.encode(fields)
    assert loose.cut == 0
    assert tight.used == V + template + 20
    assert tight.cut == loose.used - tight.used > 0
    assert "Title: Sturdy red kettle, Description:" in text_of(tokenizer, tight), (
        "the short field stays whole"
    )
    assert text_of(tokenizer, tight).endswith(", Category:<end_of_utterance>"), "and the template with it"


def test_too_few_text_tokens_are_refused_with_a_number_that_works(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.text_tokens") as caught:
        PromptEncoder(tokenizer, V, 20, field_chars=100)
    enough = int(caught.value.fix.split()[-1])
    PromptEncoder(tokenizer, V, enough, field_chars=100).encode(LISTING)


def test_a_copy_sent_to_a_dataloader_worker_encodes_the_same(encoder: PromptEncoder) -> None:
    copy = pickle.loads(pickle.dumps(encoder))
    for fields in ODD_TEXTS.values():
        assert np.array_equal(copy.encode(fields).ids, encoder.encode(fields).ids)


def test_a_tokenizer_without_the_special_tokens_is_refused(tmp_path: Path) -> None:
    make_tokenizer(TEXTS, tmp_path, vocab_size=300)
    text = (tmp_path / "tokenizer.json").read_text().replace("<global-img>", "<another>")
    (tmp_path / "tokenizer.json").write_text(text)
    settings = (tmp_path / "tokenizer_config.json").read_text().replace("<global-img>", "<another>")
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(UserError, match="lacks <global-img>"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


# --- fit_lengths --------------------------------------------------------------------------------------


def random_lengths() -> Iterator[tuple[list[int], int]]:
    rng = random.Random(5)
    for _ in range(500):
        lengths = [
            rng.choice([0, 1, rng.randint(0, 12), rng.randint(0, 300)]) for _ in range(rng.randint(1, 6))
        ]
        yield lengths, rng.randint(0, 400)


def test_fitted_lengths_never_exceed_the_budget_or_the_originals() -> None:
    for lengths, budget in random_lengths():
        kept = fit_lengths(lengths, budget)
        assert sum(kept) <= budget and len(kept) == len(lengths)
        assert all(0 <= k <= n for k, n in zip(kept, lengths))


def test_lengths_that_fit_stay_as_they_are() -> None:
    for lengths, _ in random_lengths():
        assert fit_lengths(lengths, sum(lengths)) == lengths


def test_only_the_longest_are_cut_and_to_one_common_cap() -> None:
    for lengths, budget in random_lengths():
        kept = fit_lengths(lengths, budget)
        cut = [k for k, n in zip(kept, lengths) if k < n]
        assert len(set(cut)) <= 1
        if cut:
            assert all(k <= cut[0] for k in kept)


def test_the_budget_is_used_up_to_less_than_one_token_per_cut_field() -> None:
    for lengths, budget in random_lengths():
        kept = fit_lengths(lengths, budget)
        cut = sum(k < n for k, n in zip(kept, lengths))
        assert cut == 0 or budget - sum(kept) < cut


def test_fitting_equals_the_best_cap_found_by_trying_all() -> None:
    for lengths, budget in random_lengths():
        caps = [c for c in range(max(lengths) + 1) if sum(min(n, c) for n in lengths) <= budget]
        assert fit_lengths(lengths, budget) == [min(n, max(caps)) for n in lengths]


# --- the genuine tokenizer ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_tokenizer(shared_data: Path) -> Tokenizer:
    folder = shared_data / "smolvlm_tokenizer"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the genuine SmolVLM tokenizer is not at hand")
    return load_tokenizer(str(folder))


def real_listings(shared_data: Path) -> dict[str, list[dict[str, str]]]:
    """Folder -> the four fields of every listing, as `prepare` reads them (some folders have no ids)."""
    found: dict[str, list[dict[str, str]]] = {}
    for path in sorted(shared_data.glob("*/products.jsonl")):
        rows = [record.item for record in read_source(str(path))]
        fields = [r.texts for r in rows if hasattr(r, "texts")]
        found[path.parent.name] = fields
    return found


def test_the_genuine_tokenizer_gives_the_true_ids_at_the_true_places(real_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(real_tokenizer, 36, 176, field_chars=100)
    prompt = encoder.encode(LISTING)
    start = encoder.layout.image_start
    assert prompt.ids.shape == (212,)
    assert (encoder.image_token_id, encoder.pad_token_id) == (49190, 2)
    assert prompt.ids[start - 2 : start].tolist() == [49189, 49152]
    assert (prompt.ids[start : start + 36] == 49190).all() and (prompt.ids == 49190).sum() == 36
    assert prompt.ids[start + 36] == 49189
    assert prompt.ids[prompt.used - 1] == 49279


def test_no_added_token_of_the_genuine_tokenizer_can_come_from_a_listing(real_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(real_tokenizer, 36, 176, field_chars=100)
    empty = encoder.encode(listing())
    template = sorted(i for i in empty.ids[: empty.used].tolist() if i >= 49152 or i < 17)
    added = [t.content for t in real_tokenizer.get_added_tokens_decoder().values()]
    assert len(added) > 100
    for content in added:
        prompt = encoder.encode(listing(title=f"x {content} y", main_category=content))
        ids = sorted(i for i in prompt.ids[: prompt.used].tolist() if i >= 49152 or i < 17)
        assert ids == template, content


def test_few_real_listings_lose_tokens_at_the_default_lengths(
    real_tokenizer: Tokenizer, shared_data: Path, record_property: Any
) -> None:
    encoder = PromptEncoder(real_tokenizer, 36, 176, field_chars=100)
    total = losing = longest = 0
    for name, rows in real_listings(shared_data).items():
        assert rows, f"no listing of {name} could be read"
        prompts = [encoder.encode(fields) for fields in rows]
        here = sum(p.cut > 0 for p in prompts)
        record_property(f"{name}_losing", here)
        record_property(f"{name}_most_text_tokens", max(p.used + p.cut for p in prompts) - 36)
        print(
            f"{name}: {here} of {len(rows)} listings lose tokens; the longest has "
            f"{max(p.used + p.cut for p in prompts) - 36} text tokens, the median "
            f"{int(np.median([p.used + p.cut for p in prompts])) - 36}"
        )
        total, losing = total + len(rows), losing + here
        longest = max(longest, max(p.cut for p in prompts))
    print(f"all: {losing} of {total}; most tokens cut from one listing: {longest}")
    assert total > 1000 and losing < 0.02 * total
