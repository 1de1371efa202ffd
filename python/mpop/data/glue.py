"""The nine GLUE tasks as data: files, columns, labels and official metrics.

Rows come from a folder in GLUE's own layout (`<TASK>/train.tsv`, `<TASK>/dev.tsv`) or, without
one, from the hub's `nyu-mll/glue`. Either way a split is a `datasets.Dataset` with the columns
`text`, `text_pair` (for sentence pairs) and `label`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

HUB_DATASET = "nyu-mll/glue"
_HUB_SPLITS = {
    "train": "train",
    "dev": "validation",
    "dev_matched": "validation_matched",
    "dev_mismatched": "validation_mismatched",
}


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    Attributes:
        name: The hub's configuration name, e.g. `"sst2"`.
        folder: The folder in GLUE's own layout, e.g. `"SST-2"`.
        text_columns: The one or two text columns of the TSV files.
        label_column: The label column of the TSV files.
        labels: Label names in the order of their ids; empty for regression.
        metrics: Official metrics; the first is the one reported as the task's value.
        file_labels: Labels as the TSV files spell them, where that is not `labels`.
        hub_columns: Text columns on the hub, where those are not `text_columns`.
        header: Column names of files that have no header line.
        layouts: File names by split; of several layouts the first that is complete is read.
    """

    name: str
    folder: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    file_labels: tuple[str, ...] = ()
    hub_columns: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    layouts: tuple[dict[str, str], ...] = ({"train": "train.tsv", "dev": "dev.tsv"},)

    @property
    def metric(self) -> str:
        """The primary metric."""
        return self.metrics[0]

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        """The size of the task head: 1 for regression."""
        return len(self.labels) or 1

    @property
    def dev_splits(self) -> tuple[str, ...]:
        """The splits evaluated on: one, or two for MNLI."""
        return tuple(split for split in self.layouts[0] if split != "train")

    def path(self, split: str, data_dir: str | Path) -> Path:
        """The file of `split` under `data_dir`, whether or not it exists."""
        folder = Path(data_dir) / self.folder
        for layout in self.layouts:
            if all((folder / name).is_file() for name in layout.values()):
                return folder / layout[split]
        return folder / self.layouts[0][split]


_BINARY = ("0", "1")
_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "cola",
            "CoLA",
            ("sentence",),
            "label",
            ("unacceptable", "acceptable"),
            ("matthews_correlation",),
            file_labels=_BINARY,
            header=("source", "label", "mark", "sentence"),
        ),
        Task(
            "sst2",
            "SST-2",
            ("sentence",),
            "label",
            ("negative", "positive"),
            ("accuracy",),
            file_labels=_BINARY,
        ),
        Task(
            "mrpc",
            "MRPC",
            ("#1 String", "#2 String"),
            "Quality",
            ("not_equivalent", "equivalent"),
            ("f1", "accuracy"),
            file_labels=_BINARY,
            hub_columns=_PAIR,
            # A complete pair only: GLUE's dev.tsv is cut out of msr_paraphrase_train.txt.
            layouts=(
                {"train": "train.tsv", "dev": "dev.tsv"},
                {"train": "msr_paraphrase_train.txt", "dev": "msr_paraphrase_test.txt"},
            ),
        ),
        Task("stsb", "STS-B", _PAIR, "score", (), ("pearson", "spearman")),
        Task(
            "qqp",
            "QQP",
            ("question1", "question2"),
            "is_duplicate",
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
            file_labels=_BINARY,
        ),
        Task(
            "mnli",
            "MNLI",
            _PAIR,
            "gold_label",
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            hub_columns=("premise", "hypothesis"),
            layouts=(
                {
                    "train": "train.tsv",
                    "dev_matched": "dev_matched.tsv",
                    "dev_mismatched": "dev_mismatched.tsv",
                },
            ),
        ),
        Task(
            "qnli",
            "QNLI",
            ("question", "sentence"),
            "label",
            _ENTAILMENT,
            ("accuracy",),
            layouts=(
                {"train": "train.tsv", "dev": "dev.tsv"},
                {"train": "train_subset.tsv", "dev": "dev.tsv"},
            ),
        ),
        Task("rte", "RTE", _PAIR, "label", _ENTAILMENT, ("accuracy",)),
        Task(
            "wnli",
            "WNLI",
            _PAIR,
            "label",
            ("not_entailment", "entailment"),
            ("accuracy",),
            file_labels=_BINARY,
        ),
    )
}


def find_task(name: str) -> Task | None:
    """The task called `name`: case, hyphens and underscores do not matter (SST-2 is sst2)."""
    return TASKS.get(re.sub(r"[-_ ]", "", name).lower())


def get_task(name: str) -> Task:
    """The same.

    Raises:
        ValueError: No such task.
    """
    task = find_task(name)
    if task is None:
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    return task


def compute_metrics(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's official metrics.

    Args:
        task: The task.
        predictions: Model outputs `[rows, num_labels]`: logits, or one score for regression.
        labels: Label ids, or scores, `[rows]`.

    Returns:
        One number per name in `task.metrics`. A correlation that is undefined because all
        predictions are equal is 0, as in Matthews' own convention.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn import metrics

    if task.is_regression:
        scores = predictions.reshape(len(labels))
        if np.ptp(scores) == 0 or np.ptp(labels) == 0:
            return dict.fromkeys(task.metrics, 0.0)
        return {
            "pearson": float(pearsonr(scores, labels).statistic),
            "spearman": float(spearmanr(scores, labels).statistic),
        }
    chosen = predictions.argmax(axis=-1)
    functions = {
        "accuracy": metrics.accuracy_score,
        "f1": functools.partial(metrics.f1_score, zero_division=0),
        "matthews_correlation": metrics.matthews_corrcoef,
    }
    return {name: float(functions[name](labels, chosen)) for name in task.metrics}


def load_split(task: Task, split: str, data_dir: str | Path | None = None) -> Dataset:
    """One split with the columns `text`, `text_pair` (sentence pairs only) and `label`.

    Args:
        task: The task.
        split: `"train"` or one of `task.dev_splits`.
        data_dir: A folder in GLUE's own layout; without it the hub is used.

    Raises:
        ValueError: A missing, empty or malformed file (named, with the line), or no hub.
    """
    return _load_hub(task, split) if data_dir is None else _load_tsv(task, split, data_dir)


def _text_names(task: Task) -> tuple[str, ...]:
    return ("text", "text_pair")[: len(task.text_columns)]


def _load_tsv(task: Task, split: str, data_dir: str | Path) -> Dataset:
    # load_dataset("csv") turns a truncated row, or the word "null", into None without a word.
    from datasets import ClassLabel, Dataset, Features, Value

    if not Path(data_dir).is_dir():
        raise ValueError(f"data folder {data_dir} does not exist")
    path = task.path(split, data_dir)
    rows = _rows(path)
    header = list(task.header)
    if not header:
        header = next(rows)[1]
    wanted = (*task.text_columns, task.label_column)
    missing = [column for column in wanted if column not in header]
    if missing:
        raise ValueError(
            f"{path}: missing column {', '.join(missing)}; "
            f"expected {', '.join(wanted)}, got {', '.join(header)}"
        )
    *text_indices, label_index = (header.index(column) for column in wanted)
    texts: list[list[str]] = [[] for _ in text_indices]
    labels = []
    for number, fields in rows:
        if len(fields) != len(header):
            raise ValueError(
                f"{path}:{number}: expected {len(header)} tab-separated fields, got {len(fields)}"
            )
        for column, index in zip(texts, text_indices, strict=True):
            column.append(fields[index])
        labels.append(_label(task, fields[label_index], f"{path}:{number}"))
    if not labels:
        raise ValueError(f"{path} has a header but no rows")
    names = _text_names(task)
    features = Features({name: Value("string") for name in names})
    features["label"] = Value("float32") if task.is_regression else ClassLabel(names=[*task.labels])
    columns = dict(zip(names, texts, strict=True))
    return Dataset.from_dict({**columns, "label": labels}, features=features)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields; tabs only, no quoting, and no other line break than a newline."""
    if not path.is_file():
        raise ValueError(f"missing file {path}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty")
    return ((i, line.removesuffix("\r").split("\t")) for i, line in enumerate(lines, start=1))


def _label(task: Task, text: str, place: str) -> int | float:
    if task.is_regression:
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not 0 <= score <= 5:
            raise ValueError(f"{place}: unknown label {text!r}; expected a score from 0 to 5")
        return score
    known = task.file_labels or task.labels
    if text not in known:
        raise ValueError(f"{place}: unknown label {text!r}; expected one of {', '.join(known)}")
    return known.index(text)


@functools.cache
def hub_reachable() -> bool:
    """Whether the hub answers within five seconds (asked once per process)."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # every client library has its own family of connection errors
        return False
    return True


def _load_hub(task: Task, split: str) -> Dataset:
    import huggingface_hub
    from datasets import load_dataset

    remedy = "pass --data-dir with a folder of <TASK>/{train,dev}.tsv"
    # Asked first because load_dataset itself retries for half a minute. Offline mode reads caches.
    if not huggingface_hub.is_offline_mode() and not hub_reachable():
        raise ValueError(f"the hub cannot be reached, so {HUB_DATASET} cannot be read; {remedy}")
    try:
        dataset = load_dataset(HUB_DATASET, task.name, split=_HUB_SPLITS[split])
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{HUB_DATASET} could not be loaded ({reason}); {remedy}") from error
    columns = task.hub_columns or task.text_columns
    names = dict(zip(columns, _text_names(task), strict=True))
    return dataset.select_columns([*columns, "label"]).rename_columns(names)
