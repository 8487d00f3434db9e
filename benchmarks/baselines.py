"""Trivial predictors on a prepared dataset, to hold a model's scores against. One-off; not part of the package.

    python benchmarks/baselines.py DATA

Scores on the validation split: the training mean, the mean of the item's category, and ridge regression on TF-IDF
of words of all text fields (alpha chosen on a fifth of the training split).
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter, defaultdict

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import lsqr
from streaming import StreamingDataset

from rating_train.scoring.metrics import score

MIN_DOCUMENTS = 2


def read(data: str, split: str) -> tuple[list[list[str]], list[str], np.ndarray]:
    """Words (single ones and pairs), categories and ratings of a split."""
    dataset = StreamingDataset(local=data, split=split, batch_size=1)
    words, categories, ratings = [], [], []
    for i in range(dataset.num_samples):
        row = dataset[i]
        text = " ".join(row[k] for k in ("title", "description", "features", "main_category")).lower()
        single = re.findall(r"[a-z0-9]+", text)
        words.append(single + [f"{a} {b}" for a, b in itertools.pairwise(single)])
        categories.append(row["main_category"])
        ratings.append(float(row["rating"]))
    return words, categories, np.array(ratings)


def tfidf(documents: list[list[str]], vocabulary: dict[str, int], idf: np.ndarray) -> sparse.csr_matrix:
    """Rows of (1 + log tf) * idf, of length 1."""
    rows, columns, values = [], [], []
    for r, document in enumerate(documents):
        counts = {vocabulary[w]: c for w, c in Counter(document).items() if w in vocabulary}
        weights = {c: (1 + math.log(n)) * idf[c] for c, n in counts.items()}
        norm = math.sqrt(sum(v * v for v in weights.values())) or 1.0
        rows += [r] * len(weights)
        columns += weights.keys()
        values += [v / norm for v in weights.values()]
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(documents), len(vocabulary)))


def ridge(x: sparse.csr_matrix, y: np.ndarray, alpha: float) -> np.ndarray:
    """Weights of min |x w - y|^2 + alpha |w|^2."""
    return lsqr(x, y, damp=math.sqrt(alpha), atol=1e-6, btol=1e-6, iter_lim=500)[0]


def main() -> None:
    data = sys.argv[1]
    words, categories, ratings = read(data, "train")
    val_words, val_categories, val_ratings = read(data, "val")
    mean = float(ratings.mean())
    by_category = defaultdict(list)
    for category, rating in zip(categories, ratings, strict=True):
        by_category[category].append(rating)
    means = {c: float(np.mean(v)) for c, v in by_category.items()}

    documents = Counter(w for d in words for w in set(d))
    vocabulary = {w: i for i, w in enumerate(sorted(w for w, n in documents.items() if n >= MIN_DOCUMENTS))}
    idf = np.array([math.log((1 + len(words)) / (1 + documents[w])) + 1 for w in vocabulary])
    x, x_val = tfidf(words, vocabulary, idf), tfidf(val_words, vocabulary, idf)
    held_out = np.arange(len(words)) % 5 == 0
    errors = {}
    for alpha in (0.3, 1.0, 3.0, 10.0):
        w = ridge(x[~held_out], ratings[~held_out] - mean, alpha)
        errors[alpha] = float(np.mean((x[held_out] @ w + mean - ratings[held_out]) ** 2))
    alpha = min(errors, key=lambda a: errors[a])
    predictions = {
        "train mean": np.full(len(val_ratings), mean),
        "category mean": np.array([means.get(c, mean) for c in val_categories]),
        f"ridge on TF-IDF (alpha {alpha:g}, {len(vocabulary):,} terms)": x_val
        @ ridge(x, ratings - mean, alpha)
        + mean,
    }
    print(f"{len(ratings):,} train, {len(val_ratings):,} val")
    for name, predicted in predictions.items():
        s = score(np.clip(predicted, 1, 5), val_ratings)
        numbers = [f"{k.upper()} {'undefined' if v is None else f'{v:.4f}'}" for k, v in s.as_dict().items() if k in
                   ("plcc", "srcc", "rmse", "mae")]  # fmt: skip
        print(f"{name:<48} {'  '.join(numbers)}")


if __name__ == "__main__":
    main()
