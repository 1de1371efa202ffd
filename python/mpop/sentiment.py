"""A small sentiment set made from a grammar, in SST-2's file format.

It stands in for SST-2 where neither GLUE files nor the hub are at hand, and says nothing about a
model's GLUE score. A clause joins an aspect ("the plot") to an adjective, possibly intensified or
negated; a sentence may contrast two clauses, in which case only one of them decides the label. So
the same word occurs under both labels, and reading the sentence's structure pays.
"""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

from mpop.data.glue import get_task

_ASPECTS = (
    "acting,plot,script,dialogue,pacing,camera work,soundtrack,humour,ending,cast,direction,"
    "editing,story,lead performance,opening scene,production design"
)
_ADJECTIVES = {
    1: (
        "brilliant,moving,charming,clever,gripping,elegant,warm,inventive,convincing,delightful,"
        "witty,superb,graceful,thrilling,honest,memorable"
    ),
    0: (
        "dull,clumsy,tedious,shallow,lifeless,awful,predictable,messy,bland,irritating,stale,"
        "dreary,hollow,sloppy,forgettable,pointless"
    ),
}
_INTENSIFIERS = ("", "", "very ", "truly ", "remarkably ", "quite ", "thoroughly ")
_AFFIRMATIONS = ("is {}", "remains {}", "turns out to be {}", "feels {}", "proves {}")
_NEGATIONS = (
    "is not {}",
    "is never {}",
    "is hardly {}",
    "is anything but {}",
    "is far from {}",
    "could not be less {}",
)
# {main} decides the label, {other} has the opposite polarity.
_CONTRASTS = (
    "{other} , but {main} .",
    "although {other} , {main} .",
    "{main} , even though {other} .",
    "while {other} , what counts is that {main} .",
    "{main} , despite the fact that {other} .",
    "some will say that {other} ; in truth {main} .",
)
_STATEMENTS = (
    "{main} .",
    "in this film {main} .",
    "nobody can deny that {main} .",
    "from the first minute {main} .",
    "it has to be said that {main} .",
    "for all its length , {main} .",
)

Pair = tuple[str, str]


def generate(
    num_train: int = 2000, num_dev: int = 400, seed: int = 0
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Train and dev rows `(sentence, label)`, label 1 for positive, the same for the same seed.

    No sentence occurs twice. A fifth of the (aspect, adjective) pairs is held out: in every dev
    sentence the deciding clause uses such a pair, and no training sentence contains one.

    Raises:
        ValueError: A size is not positive, or more sentences are asked for than can be made.
    """
    if num_train < 1 or num_dev < 1:
        raise ValueError(f"sizes must be positive, got {num_train} and {num_dev}")
    rng = random.Random(seed)
    pairs: dict[bool, dict[int, list[Pair]]] = {True: {}, False: {}}
    for polarity, adjectives in _ADJECTIVES.items():
        combinations = list(product(_ASPECTS.split(","), adjectives.split(",")))
        rng.shuffle(combinations)
        cut = len(combinations) // 5
        pairs[True][polarity], pairs[False][polarity] = combinations[:cut], combinations[cut:]
    return _rows(rng, pairs, num_train, held_out=False), _rows(rng, pairs, num_dev, held_out=True)


def write(folder: str | Path, num_train: int = 2000, num_dev: int = 400, seed: int = 0) -> Path:
    """Write the set as `<folder>/SST-2/{train,dev}.tsv`; returns `folder`, a data folder."""
    train, dev = generate(num_train, num_dev, seed)
    target = Path(folder) / get_task("sst2").folder
    target.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("dev", dev)):
        lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in rows)]
        (target / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(folder)


def _rows(
    rng: random.Random, pairs: dict[bool, dict[int, list[Pair]]], count: int, held_out: bool
) -> list[tuple[str, int]]:
    rows: dict[str, int] = {}
    for _ in range(50 * count):
        label = len(rows) % 2
        main_aspect, main = _clause(rng, pairs[held_out], label)
        if rng.random() < 0.5:
            other_aspect, other = _clause(rng, pairs[False], 1 - label)
            if other_aspect == main_aspect:
                continue
            sentence = rng.choice(_CONTRASTS).format(main=main, other=other)
        else:
            sentence = rng.choice(_STATEMENTS).format(main=main)
        rows.setdefault(sentence, label)
        if len(rows) == count:
            shuffled = list(rows.items())
            rng.shuffle(shuffled)
            return shuffled
    raise ValueError(f"the grammar has fewer than {count} sentences of this kind; ask for fewer")


def _clause(rng: random.Random, pairs: dict[int, list[Pair]], polarity: int) -> Pair:
    """An aspect, and a clause about it that means `polarity`, negated three times in ten."""
    if rng.random() < 0.3:
        aspect, adjective = rng.choice(pairs[1 - polarity])
        return aspect, f"the {aspect} {rng.choice(_NEGATIONS).format(adjective)}"
    aspect, adjective = rng.choice(pairs[polarity])
    predicate = rng.choice(_AFFIRMATIONS).format(rng.choice(_INTENSIFIERS) + adjective)
    return aspect, f"the {aspect} {predicate}"
