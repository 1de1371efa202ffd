"""The generated sentiment set: reproducible, disjoint, balanced, and not a matter of one word."""

from __future__ import annotations

import itertools
import re

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from mpop import sentiment
from mpop.data.glue import TASKS, load_split


@pytest.fixture(scope="module")
def rows():
    return sentiment.generate(1500, 400, seed=0)


def pairs(text):
    aspects = sentiment._ASPECTS.split(",")
    adjectives = [a for words in sentiment._ADJECTIVES.values() for a in words.split(",")]
    clauses = re.split(r" , | ; |even though|despite the fact", text)
    return {
        (aspect, adjective)
        for clause in clauses
        for aspect, adjective in itertools.product(aspects, adjectives)
        if f"the {aspect} " in clause and re.search(rf"\b{adjective}\b", clause)
    }


def test_same_seed_same_rows(rows):
    assert sentiment.generate(1500, 400, seed=0) == rows
    assert sentiment.generate(1500, 400, seed=1) != rows


def test_sizes_balance_and_no_repeats(rows):
    train, dev = rows
    assert (len(train), len(dev)) == (1500, 400)
    texts = [text for text, _ in train + dev]
    assert len(set(texts)) == len(texts)
    for part in rows:
        assert sum(label for _, label in part) * 2 == len(part)


def test_dev_uses_combinations_that_train_never_shows(rows):
    train, dev = rows
    seen = set().union(*(pairs(text) for text, _ in train))
    assert all(pairs(text) - seen for text, _ in dev)


def test_words_alone_do_not_tell(rows):
    (train, labels), (dev, truth) = (zip(*part, strict=True) for part in rows)
    words = CountVectorizer()
    model = LogisticRegression(max_iter=1000).fit(words.fit_transform(train), labels)
    assert model.score(words.transform(dev), truth) < 0.75


def test_files_are_in_sst2_format(tmp_path):
    assert sentiment.write(tmp_path, 30, 10, seed=3) == tmp_path
    train, dev = sentiment.generate(30, 10, seed=3)
    for split, made in (("train", train), ("dev", dev)):
        dataset = load_split(TASKS["sst2"], split, tmp_path)
        assert list(zip(dataset["text"], dataset["label"], strict=True)) == made


def test_sizes_that_cannot_be_had(monkeypatch):
    with pytest.raises(ValueError, match="sizes must be positive, got 0 and 5"):
        sentiment.generate(0, 5)
    monkeypatch.setattr(sentiment, "_ASPECTS", "plot")
    with pytest.raises(ValueError, match="fewer than 3000 sentences"):
        sentiment.generate(10, 3000)
