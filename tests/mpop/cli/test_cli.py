"""The `mpop` command: its results, its help, and one line with exit code 2 for what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_glue import last_json
from transformers import AutoModel, AutoModelForSequenceClassification, BertModel

import mpop
from mpop.cli import main
from mpop.data.glue import TASKS

COMMANDS = ("compress", "finetune", "evaluate", "inspect", "merge", "export")
KEYS = {
    *("task", "metric", "value", "metrics", "trainable_parameters", "total_parameters"),
    *("train_seconds", "peak_memory_bytes", "seed"),
}
QUERY = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def compressed(bert, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "compressed"
    assert run("compress", "--model", bert, "--output", output, "--num-cores", 3) == 0
    return output


@pytest.fixture
def fast(data):
    return ("--data-dir", data, "--epochs", 1, "--max-length", 16, "--batch-size", 8)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    """The one line on stderr of a command that ends with exit code 2."""
    try:
        code = run(*arguments)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("mpop")
    return lines[0]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"mpop {command}" in text for command in COMMANDS)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert "--model" in capsys.readouterr().out


def test_finetune_in_a_process_of_its_own(bert, data, tmp_path):
    command = f"-m mpop finetune --model {bert} --task SST-2 --output {tmp_path / 'out'}"
    command += f" --data-dir {data} --method light --epochs 1 --max-length 16 --seed 3 --json"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result.keys() >= KEYS
    assert (result["task"], result["method"], result["seed"]) == ("sst2", "light", 3)
    assert result == json.loads((tmp_path / "out" / "results.json").read_text())
    assert "loss" in done.stderr


def test_evaluate_prints_a_table_or_json(bert, fast, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert run("finetune", "--model", bert, "--task", "rte", "--output", output, *fast) == 0
    assert "trained parameters" in capsys.readouterr().out
    evaluate = ("evaluate", "--model", output, "--task", "rte", "--data-dir", data)
    evaluate += ("--max-length", 16)
    assert run(*evaluate) == 0
    table = capsys.readouterr().out
    assert run(*evaluate, "--json") == 0
    result = last_json(capsys.readouterr().out)
    assert result.keys() >= KEYS
    assert result["value"] == json.loads((output / "results.json").read_text())["value"]
    assert f"{result['value']:.4f}" in table
    assert f"{result['total_parameters']:,}" in table


def test_compress_then_merge_gives_the_model_back(bert, compressed, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert run("merge", "--model", compressed, "--output", merged, "--json") == 0
    result = last_json(capsys.readouterr().out)
    before, after = AutoModel.from_pretrained(bert), AutoModel.from_pretrained(merged)
    assert result["total_parameters"] == mpop.count_parameters(before).total
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert (merged / "tokenizer.json").read_bytes() == (bert / "tokenizer.json").read_bytes()


def test_a_model_is_replaced_wholly_or_not_at_all(bert, compressed, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(compressed, output)
    for name in ("results.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", ".keep"):
        (output / name).write_text("{}")
    (output / "runs").mkdir()
    (output / "runs/log").write_text("log")
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    for source, command in ((compressed, "merge"), (bert, "compress")):
        arguments = (command, "--model", source, "--output", output)
        assert f"{output} holds a model: choose another folder, or" in fails(capsys, *arguments)
        assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    kept = {file.name for file in compressed.iterdir()} - {"README.md"} | {".keep", "runs"}
    assert run("merge", "--model", compressed, "--output", output, "--overwrite") == 0
    assert {file.name for file in output.iterdir()} == kept
    assert type(AutoModel.from_pretrained(output).pooler.dense) is torch.nn.Linear
    assert run("compress", "--model", bert, "--output", output, "--overwrite") == 0
    assert {file.name for file in output.iterdir()} == {*kept, "README.md"}
    assert (output / "runs/log").read_text() == "log" and mpop.load(output)
    # A folder without a model keeps what it has.
    (tmp_path / "new").mkdir()
    (tmp_path / "new/README.md").write_text("mine")
    assert run("compress", "--model", bert, "--output", tmp_path / "new") == 0
    assert (tmp_path / "new/README.md").read_text() == "mine"


def test_compress_options(bert, tmp_path, capsys):
    output = tmp_path / "out"
    options = ("--num-cores", 2, "--ranks", 3, "--include", "*.query", "--json")
    assert run("compress", "--model", bert, "--output", output, *options) == 0
    rows = last_json(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == [QUERY, QUERY.replace("0", "1")]
    assert all(row["ranks"] == [3] for row in rows)
    core = load_file(output / "model.safetensors")[f"{QUERY}.cores.0"]
    assert core.shape[-1] == 3
    options = ("--compression", 0.5, "--exclude", "*.query", "*.key", "--no-embeddings", "--json")
    again = ("compress", "--model", bert, "--output", output, "--overwrite")
    assert run(*again, *options) == 0
    rows = last_json(capsys.readouterr().out)["rows"]
    assert not any("embed" in row["name"] or "query" in row["name"] for row in rows)
    assert all(row["parameters_after"] <= 0.5 * row["parameters_before"] for row in rows)
    options = ("--tensor-parallel", 4, "--no-embeddings", "--json")
    assert run(*again, *options) == 0
    shapes = [row["shape"] for row in last_json(capsys.readouterr().out)["rows"]]
    assert shapes and all(s["in_factors"][0] % 4 == s["out_factors"][0] % 4 == 0 for s in shapes)
    options = ("--model", bert, "--output", tmp_path / "new", "--tensor-parallel", 5)
    assert run("compress", *options) == 2
    assert "tensor_parallel = 5 divides" in capsys.readouterr().err.splitlines()[-1]
    options = ("--num-cores", 3, "--ranks", 2, 4)
    assert run(*again, *options) == 0
    assert "whole model" in capsys.readouterr().out


def test_a_head_survives_compress(bert, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    run("compress", "--model", tmp_path / "classifier", "--output", tmp_path / "out")
    loaded = mpop.load(tmp_path / "out")
    torch.testing.assert_close(loaded.classifier.weight, classifier.classifier.weight)


@pytest.mark.parametrize("command", ["compress", "inspect"])
def test_matrices_are_decomposed_where_asked(command, bert, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(BertModel, "to", lambda model, device: seen.append(device) or model)
    arguments = (command, "--model", bert)
    if command == "compress":
        arguments += ("--output", tmp_path / "out", "--overwrite", "--include", "*.query")
    for device in ("cpu", "cuda", "cuda:1"):
        assert run(*arguments, "--device", device) == 0
    assert run(*arguments) == 0
    assert seen == ["cpu", "cuda", "cuda:1", "cpu"]
    capsys.readouterr()
    line = fails(capsys, *arguments, "--device", "cuda:2")
    assert "--device: expected one of cpu, cuda, cuda:0, cuda:1, got 'cuda:2'" in line
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert "expected one of cpu, got 'cuda'" in fails(capsys, *arguments, "--device", "cuda")


@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_a_plot_with_nowhere_to_go_is_refused_before_the_work(command, tmp_path, capsys):
    for plot, message in (
        (tmp_path / "nowhere" / "a.png", "nowhere: expected a folder for the plot"),
        (tmp_path, "expected a file for the plot"),
        (tmp_path / "a.doc", "a.doc: expected one of eps,"),
    ):
        assert message in fails(capsys, command, "--model", tmp_path / "none", "--plot", plot)


@pytest.mark.parametrize("which", ["bert", "compressed"])
def test_inspect(which, request, tmp_path, capsys):
    plot = tmp_path / "spectra.png"
    model = request.getfixturevalue(which)
    assert run("inspect", "--model", model, "--plot", plot, "--json") == 0
    rows = last_json(capsys.readouterr().out)["rows"]
    assert {row["is_dense"] for row in rows} == {which == "bert"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run("inspect", "--model", model) == 0
    assert QUERY in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("train",), "invalid choice: 'train'"),
        (("finetune",), "required: --model, --output, --task"),
        (("evaluate", "--model", "M", "--task", "sst3"), "unknown task 'sst3'; expected one of"),
        (("squeeze", "--max-drop", "-1"), "expected a number of at least 0, got '-1'"),
        (("squeeze", "--max-drop", "nan"), "expected a number of at least 0, got 'nan'"),
        (("inspect", "--model", "M", "--colour", "red"), "unrecognized arguments: --colour red"),
    ],
)
def test_bad_command_lines(arguments, message, capsys):
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epochs", "0", "expected a positive number, got '0'"),
        ("--learning-rate", "-1", "expected a positive number, got '-1'"),
        ("--mpo-learning-rate", "nan", "expected a positive number, got 'nan'"),
        ("--batch-size", "1.5", "expected a positive integer, got '1.5'"),
        ("--max-train-samples", "0", "expected a positive integer, got '0'"),
        ("--method", "lite", "invalid choice: 'lite'"),
        ("--precision", "int8", "invalid choice: 'int8'"),
        ("--seed", "x", "invalid int value: 'x'"),
        ("--data-dir", "nowhere", "data folder nowhere does not exist"),
        ("--model", "no/such/model", "model no/such/model cannot be loaded"),
    ],
)
def test_bad_values_write_nothing(option, value, message, bert, fast, tmp_path, capfd):
    output = tmp_path / "out"
    arguments = ("finetune", "--model", bert, "--task", "rte", "--output", output, *fast)
    arguments += (option, value)
    try:
        code = run(*arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    # Loading a model may report on it first; what went wrong is the last line.
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing file"),
        ("", "is empty"),
        ("sentence\tlabel\n", "has a header but no rows"),
        ("text\tlabel\nfine\t1\n", "missing column sentence; expected sentence, label, got text"),
        ("sentence\tlabel\nfine\t1\npoo", "train.tsv:3: expected 2 tab-separated fields, got 1"),
        (
            "sentence\tlabel\nfine\tgood\n",
            "train.tsv:2: unknown label 'good'; expected one of 0, 1",
        ),
    ],
)
def test_bad_data_files(content, message, bert, data, tmp_path, capsys):
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    (folder / "dev.tsv").write_bytes(TASKS["sst2"].path("dev", data).read_bytes())
    if content is not None:
        (folder / "train.tsv").write_text(content)
    output = tmp_path / "out"
    arguments = ("--model", bert, "--task", "sst2", "--output", output, "--data-dir", folder.parent)
    assert message in fails(capsys, "finetune", *arguments)
    assert not output.exists()


def test_bad_models(bert, compressed, data, tmp_path, capfd):
    output = tmp_path / "out"
    to = ("--output", output)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in bert.iterdir():
        (damaged / file.name).write_bytes(
            file.read_bytes()[: 2000 if file.stem == "model" else None]
        )
    (tmp_path / "empty").mkdir()
    task = ("--task", "rte", "--data-dir", data)
    for message, *arguments in (
        ("cannot be loaded", "compress", "--model", tmp_path / "empty", *to),
        ("already compressed", "compress", "--model", compressed, *to),
        ("fits none of", "compress", "--model", bert, "--include", "query", *to),
        ("got a dense BertModel", "merge", "--model", bert, *to),
        (
            f"{compressed} holds {compressed}, which is read",
            "merge",
            "--model",
            compressed,
            "--output",
            compressed,
        ),
        ("no trained task head", "evaluate", "--model", bert, *task),
        ("no trained task head", "evaluate", "--model", compressed, *task),
        ("cannot be loaded", "inspect", "--model", damaged),
        ("already compressed", "finetune", "--model", compressed, *task, *to),
        ("holds a model", "finetune", "--model", bert, *task, "--output", compressed, "--resume"),
    ):
        assert run(*arguments) == 2, arguments
        *_, line = capfd.readouterr().err.splitlines()
        assert line.startswith(f"mpop {arguments[0]}: error:")
        assert message in line
        assert not list(output.glob("*.safetensors"))


def test_no_hub_is_told_in_seconds(bert, tmp_path, capsys, monkeypatch):
    from mpop.data import glue

    monkeypatch.setattr(glue, "hub_reachable", lambda: False)
    arguments = ("--model", bert, "--task", "rte", "--output", tmp_path / "out")
    assert "the hub cannot be reached" in (line := fails(capsys, "finetune", *arguments))
    assert "pass --data-dir" in line


def test_a_missing_package_is_named(bert, data, tmp_path, capsys, monkeypatch):
    for name in ("task", "rows"):
        monkeypatch.delitem(sys.modules, f"mpop.finetuning.{name}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    arguments = ("--model", bert, "--task", "rte", "--output", tmp_path / "out", "--data-dir", data)
    line = fails(capsys, "finetune", *arguments)
    assert 'datasets is not installed; install it with: pip install "mpo-kernels[mpop]"' in line


def test_without_transformers_the_command_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None\nfrom mpop.cli import main\n"
    options = ["--model", "m", "--output", "o"]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main({['compress', *options]}))"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    remedy = 'pip install "mpo-kernels[mpop]"'
    assert done.stderr.splitlines() == [
        f"mpop compress: error: transformers is not installed; install it with: {remedy}"
    ]
    assert subprocess.run([sys.executable, "-c", f"{code}main(['--help'])"]).returncode == 0


@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_a_checkpoint_with_nan_is_one_line(command, compressed, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(compressed, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith(f"{QUERY}.cores.1"))
    tensors[name][0, 0, 0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    more = ("--output", tmp_path / "dense") if command == "merge" else ()
    assert run(command, "--model", broken, *more) == 2
    # The bar of loading comes first.
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("mpop") and QUERY in line and "NaN or Inf in core 1" in line
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("model", ["/nonexistent/model", "a/b/c"])
def test_a_folder_that_is_not_there_is_called_that(model, capsys):
    assert "there is no such folder" in fails(capsys, "inspect", "--model", model)


def test_a_share_of_trained_parameters(bert, fast, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert run("compress", "--model", bert, "--output", output, "--share", 0.05, "--json") == 0
    rows = last_json(capsys.readouterr().out)["rows"]
    query = next(row for row in rows if row["name"] == QUERY)
    assert query["shape"]["in_factors"] == [8, 4] and query["rel_error"] < 1e-5
    tune = ("finetune", "--model", bert, "--task", "rte", "--output", tmp_path / "tuned", *fast)
    tune = (*tune, "--overwrite")
    trained = []
    for share in (0.01, 0.25):
        assert run(*tune, "--method", "light", "--share", share, "--json") == 0
        trained.append(last_json(capsys.readouterr().out)["trainable_parameters"])
    assert trained[0] < trained[1]
    assert run(*tune, "--share", 0.1) == 2
    assert "--share: expected --method light" in capsys.readouterr().err.splitlines()[-1]
    assert run(*tune, "--mpo-learning-rate", 0.1) == 2
    assert "rate: expected --method full or light" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        run(*tune, "--method", "light", "--share", 1)
    assert "expected a number above 0 and below 1" in capsys.readouterr().err
