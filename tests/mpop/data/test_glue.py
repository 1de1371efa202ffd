"""GLUE as data: registry, metrics, files in every layout, and what is said of bad ones."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from tiny_glue import header, real_glue, rows, write_glue, write_tsv

from mpop.data import glue
from mpop.data.glue import TASKS, compute_metrics, get_task, load_split

NAMES = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
ROWS = {
    ("cola", "train"): 8551,
    ("cola", "dev"): 1043,
    ("sst2", "train"): 67349,
    ("sst2", "dev"): 872,
    ("rte", "train"): 2490,
    ("rte", "dev"): 277,
    ("wnli", "train"): 635,
    ("wnli", "dev"): 71,
    ("qnli", "dev"): 5463,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"))


def logits(choices, classes=2):
    return np.eye(classes)[np.asarray(choices)]


def test_the_nine_tasks():
    assert list(TASKS) == NAMES
    assert {name: task.metrics for name, task in TASKS.items()} == {
        "cola": ("matthews_correlation",),
        "sst2": ("accuracy",),
        "mrpc": ("f1", "accuracy"),
        "stsb": ("pearson", "spearman"),
        "qqp": ("f1", "accuracy"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }
    assert [task.num_labels for task in TASKS.values()] == [2, 2, 2, 1, 2, 3, 2, 2, 2]
    assert TASKS["mnli"].dev_splits == ("dev_matched", "dev_mismatched")


@pytest.mark.parametrize("alias", ["sst2", "SST2", "sst-2", "SST-2", "Sst_2"])
def test_aliases(alias):
    assert get_task(alias) is TASKS["sst2"]


@pytest.mark.parametrize("task", TASKS.values(), ids=NAMES)
def test_a_folder_name_is_an_alias(task):
    assert get_task(task.folder) is task


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'sst3'; expected one of cola, sst2, mrpc"):
        get_task("sst3")


def test_accuracy_by_hand():
    values = compute_metrics(TASKS["rte"], logits([0, 1, 1, 1]), np.array([0, 1, 0, 1]))
    assert values == {"accuracy": 0.75}


def test_f1_by_hand():
    # 2 true positives, 1 false positive, 1 false negative: precision = recall = 2/3.
    values = compute_metrics(TASKS["mrpc"], logits([1, 0, 1, 1]), np.array([1, 1, 0, 1]))
    assert values == {"f1": pytest.approx(2 / 3), "accuracy": 0.5}


def test_matthews_by_hand():
    # TP 1, FN 1, TN 2, FP 0: (1·2 − 0·1) / √(1·2·2·3).
    values = compute_metrics(TASKS["cola"], logits([1, 0, 0, 0]), np.array([1, 1, 0, 0]))
    assert values == {"matthews_correlation": pytest.approx(2 / math.sqrt(12))}


def test_correlations_by_hand():
    # Deviations (−1.5, −0.5, 0.5, 1.5) and (−3, −2, −1, 6): 14 / √(5·50); the order is the same.
    scores, labels = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([1.0, 2.0, 3.0, 10.0])
    values = compute_metrics(TASKS["stsb"], scores, labels)
    assert values == {"pearson": pytest.approx(14 / math.sqrt(250)), "spearman": pytest.approx(1)}


def test_correlation_of_constant_predictions_is_zero():
    constant = compute_metrics(TASKS["stsb"], np.ones((3, 1)), np.array([1.0, 2.0, 3.0]))
    assert constant == {"pearson": 0.0, "spearman": 0.0}
    same_class = compute_metrics(TASKS["cola"], logits([1, 1]), np.array([0, 1]))
    assert same_class == {"matthews_correlation": 0.0}


@pytest.mark.parametrize("task", TASKS.values(), ids=NAMES)
def test_every_task_loads(task, data):
    for split, name in task.layouts[0].items():
        written = rows(task, 48 if split == "train" else 24)
        dataset = load_split(task, split, data)
        columns = dict(zip(header(task), zip(*written, strict=True), strict=True))
        names = ("text", "text_pair")[: len(task.text_columns)]
        assert dataset.column_names == [*names, "label"], name
        for name, column in zip(names, task.text_columns, strict=True):
            assert dataset[name][:] == list(columns[column])
        labels = columns[task.label_column]
        if task.is_regression:
            assert dataset["label"][:] == [float(label) for label in labels]
        else:
            spelling = task.file_labels or task.labels
            assert [spelling[label] for label in dataset["label"]] == list(labels)
            assert dataset.features["label"].names == list(task.labels)


def test_quotes_nulls_and_line_ends_are_text(tmp_path):
    texts = ['he said "no', "null", "NA", "", "carriage", "form\x0cfeed \u2028 stays"]
    path = tmp_path / "SST-2" / "dev.tsv"
    write_tsv(path, TASKS["sst2"], [[text, "1"] for text in texts])
    path.write_bytes(path.read_bytes().replace(b"carriage\t1\n", b"carriage\t1\r\n") + b"\n")
    assert load_split(TASKS["sst2"], "dev", tmp_path)["text"][:] == texts


def test_mrpc_in_its_own_names(tmp_path):
    task, folder = TASKS["mrpc"], tmp_path / "MRPC"
    for name, count in (("train", 6), ("test", 4)):
        path = folder / f"msr_paraphrase_{name}.txt"
        write_tsv(path, task, rows(task, count))
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_split(task, "train", tmp_path)) == 6
    assert len(load_split(task, "dev", tmp_path)) == 4
    # A train.tsv without dev.tsv must not be paired with them: GLUE cuts its dev set out of one.
    (folder / "msr_paraphrase_test.txt").rename(folder / "dev.tsv")
    with pytest.raises(ValueError, match=r"missing file .*MRPC.train\.tsv"):
        load_split(task, "train", tmp_path)


def test_qnli_subset_stands_in_for_train(tmp_path):
    task, folder = TASKS["qnli"], tmp_path / "QNLI"
    write_tsv(folder / "dev.tsv", task, rows(task, 4))
    header_line = "index\tquestion\tsentence\tlabel\tsource\n"
    (folder / "train_subset.tsv").write_text(header_line + "0\ta\tb\tentailment\tx\n")
    assert load_split(task, "train", tmp_path)["text_pair"][:] == ["b"]
    write_tsv(folder / "train.tsv", task, rows(task, 5))
    assert len(load_split(task, "train", tmp_path)) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sst2", b"", r"SST-2.dev\.tsv is empty"),
        ("sst2", b"\n\n", r"SST-2.dev\.tsv is empty"),
        ("sst2", b"sentence\tlabel\n", "has a header but no rows"),
        ("sst2", b"text\tlabel\na\t1\n", "missing column sentence; expected sentence, label, got"),
        (
            "sst2",
            b"sentence\tlabel\na\t1\nb\n",
            r"dev\.tsv:3: expected 2 tab-separated fields, got 1",
        ),
        ("sst2", b"sentence\tlabel\na\tb\t1\n", r"dev\.tsv:2: expected 2 .* fields, got 3"),
        ("sst2", b"sentence\tlabel\na\t1\n\nb\t1\n", r"dev\.tsv:3: expected 2 .* fields, got 1"),
        (
            "sst2",
            b"sentence\tlabel\na\t2\n",
            r"dev\.tsv:2: unknown label '2'; expected one of 0, 1",
        ),
        ("sst2", b"sentence\tlabel\n\xff\xfe\t1\n", r"dev\.tsv is not UTF-8"),
        ("rte", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", "unknown label '1'"),
        ("cola", b"gj04\t1\t\n", r"dev\.tsv:1: expected 4 tab-separated fields, got 3"),
        ("stsb", b"sentence1\tsentence2\tscore\na\tb\tx\n", "unknown label 'x'; expected a score"),
        ("stsb", b"sentence1\tsentence2\tscore\na\tb\t5.1\n", "unknown label '5.1'"),
        ("stsb", b"sentence1\tsentence2\tscore\na\tb\tnan\n", "unknown label 'nan'"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    task = TASKS[name]
    path = task.path("dev", tmp_path)
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_split(task, "dev", tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data folder .*nowhere does not exist"):
        load_split(TASKS["sst2"], "dev", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"missing file .*MNLI.dev_mismatched\.tsv"):
        load_split(TASKS["mnli"], "dev_mismatched", tmp_path)


def test_a_hub_out_of_reach_is_told_at_once(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    glue.hub_reachable.cache_clear()
    start = time.perf_counter()
    try:
        with pytest.raises(ValueError, match=r"hub cannot be reached.*pass --data-dir") as caught:
            load_split(TASKS["sst2"], "dev")
    finally:
        glue.hub_reachable.cache_clear()
    assert time.perf_counter() - start < 10
    assert "\n" not in str(caught.value)


def test_hub_columns_and_splits(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        columns = {"premise": ["a"], "hypothesis": ["b"], "label": [2], "idx": [0]}
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(glue, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = TASKS["mnli"]
    for split in ("train", *task.dev_splits):
        row = load_split(task, split)[0]
        assert row == {"text": "a", "text_pair": "b", "label": 2}
    assert asked == [
        ("nyu-mll/glue", "mnli", "train"),
        ("nyu-mll/glue", "mnli", "validation_matched"),
        ("nyu-mll/glue", "mnli", "validation_mismatched"),
    ]


@pytest.mark.parametrize(("name", "split"), ROWS)
def test_real_files(name, split):
    dataset = load_split(TASKS[name], split, real_glue())
    assert len(dataset) == ROWS[name, split]
    assert set(dataset["label"][:]) == {0, 1}
