"""Token ids by words are the ids of the library, whatever the text and the tokenizer."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from rating_train.data.field_tokenizer import FieldTokenizer, id_bytes, word_split
from rating_train.data.prompt import load_tokenizer
from rating_train.demo.tokenizer import make_tokenizer

TEXTS = ["It's a red kettle, Model K01 for 220-240 V.", "They're 12x better; don't wait!", "  two  spaces"]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
WITH_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    make_tokenizer(TEXTS * 5, tmp_path, vocab_size=400)
    return load_tokenizer(str(tmp_path))


def expected(tokenizer: Tokenizer, texts: list[str]) -> list[bytes]:
    """Return what the library gives for complete texts, with special tokens as text."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return [id_bytes(plain.encode(text, add_special_tokens=False).ids) for text in texts]


def random_texts(seed: int, count: int) -> list[str]:
    """Return texts of words, and of runs of one kind of character; now and then one that is not Western."""
    rng = random.Random(seed)
    kinds = [
        "abcXYZ",
        "0123456789",
        "    ",
        " \t\n\r\x0b\x0c",
        "'sdtmrelv",
        ".,-!&",
        "²½\x85\xa0  1",
        "é \u2019€™s",
    ]
    kinds += ["".join(map(chr, range(*bounds))) for bounds in ((0, 0x80), (0x80, 0x250), (0x2000, 0x2070))]
    texts = []
    for _ in range(count):
        runs = [
            "".join(rng.choices(rng.choice(kinds), k=rng.randint(1, 5))) for _ in range(rng.randint(0, 12))
        ]
        if rng.random() < 0.2:
            runs.insert(0, rng.choice(["水", "\u2003", "٣", "e\u0301", "🫖", "<image>"]))
        texts.append("".join(runs))
    return texts


@pytest.mark.parametrize("splitter", [BYTE_LEVEL, WITH_DIGITS], ids=["byte level", "with digits"])
def test_any_text_gets_the_ids_of_the_library(
    tokenizer: Tokenizer, splitter: pre_tokenizers.PreTokenizer
) -> None:
    tokenizer.pre_tokenizer = splitter
    assert word_split(tokenizer) is not None
    fields = FieldTokenizer(tokenizer)
    for seed in range(4):
        texts = random_texts(seed, 2000) + TEXTS
        assert fields.encode_all(texts) == expected(tokenizer, texts)
    assert fields.encode_all([]) == [] and fields.encode_all([""]) == [b""]


def test_a_tokenizer_that_splits_in_another_way_is_left_to_the_library(tokenizer: Tokenizer) -> None:
    def changed(**parts: object) -> Tokenizer:
        copy = Tokenizer.from_str(tokenizer.to_str())
        for name, value in parts.items():
            setattr(copy, name, value)
        return copy

    added = changed()
    added.add_tokens([AddedToken("red kettle", special=False)])
    dropping = changed()
    dropping.model.dropout = 0.5
    others = [
        changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTE_LEVEL])),
        changed(pre_tokenizer=pre_tokenizers.Sequence([BYTE_LEVEL, WITH_DIGITS])),
        changed(normalizer=normalizers.Lowercase()),
        added,
    ]  # fmt: skip
    texts = random_texts(3, 500) + TEXTS
    for other in others:
        assert word_split(other) is None
        assert FieldTokenizer(other).encode_all(texts) == expected(other, texts)
    assert word_split(dropping) is None, "each occurrence of a word may have other ids"


def test_the_words_that_are_kept_are_bounded(tokenizer: Tokenizer) -> None:
    fields = FieldTokenizer(tokenizer, most_chars=500)
    for seed in range(20):
        texts = random_texts(seed, 100)
        assert fields.encode_all(texts) == expected(tokenizer, texts)
        newest = sum(map(len, set(word_split(tokenizer)(" ".join(texts)))))  # type: ignore[misc]
        assert sum(map(len, fields._ids)) <= 500 + newest


def test_a_pickled_copy_gives_the_same(tokenizer: Tokenizer) -> None:
    texts = [*random_texts(1, 200), "a <image> b", "é <image>"]
    copy = pickle.loads(pickle.dumps(FieldTokenizer(tokenizer)))
    assert copy.encode_all(texts) == expected(tokenizer, texts)


def test_the_genuine_tokenizer_is_one_of_those_that_are_known(shared_data: Path) -> None:
    folder = shared_data / "smolvlm_tokenizer"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the genuine SmolVLM tokenizer is not at hand")
    genuine = load_tokenizer(str(folder))
    assert word_split(genuine) is not None
    fields = FieldTokenizer(genuine)
    for seed in range(5):
        texts = random_texts(seed, 4000)
        assert fields.encode_all(texts) == expected(genuine, texts)
