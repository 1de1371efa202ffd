"""EleutherAI's harness on a compressed checkpoint, with a task of a file and no network."""

from __future__ import annotations

import json
import math
import sys
from functools import partialmethod
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_text import llama, tokenizer, words

import mpop
from mpop import lm_eval

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: FILE}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="no lm_eval (`make` installs it)")
def test_the_harness_loads_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder, text = llama(), tmp_path / "model", words(40)
    mpop.compress(model, mpop.CompressionConfig(num_cores=2, ranks=4))
    mpop.save(model, folder)
    tokenizer().save_pretrained(folder)
    (tmp_path / "tiny.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "tiny.yaml").write_text(TASK.replace("FILE", str(tmp_path / "tiny.jsonl")))
    # The fourteen thousand files of its own tasks would be read first.
    tasks = import_module("lm_eval.tasks.manager").TaskManager
    monkeypatch.setattr(tasks, "__init__", partialmethod(tasks.__init__, include_defaults=False))
    options = f"--model hf --model_args pretrained={folder},add_bos_token=False --tasks tiny"
    paths = f"--device cpu --include_path {tmp_path} --output_path {tmp_path}/out.json"
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *options.split(), *paths.split()])
    lm_eval.main()
    (written,) = tmp_path.glob("out_*.json")
    found = json.loads(written.read_text())["results"]["tiny"]["bits_per_byte,none"]
    # Every token but BOS is a target.
    ids = torch.tensor(tokenizer()(text).input_ids)
    expected = mpop.perplexity(model, ids, seqlen=len(ids))
    assert expected.targets == 40
    assert found == pytest.approx(expected.nats * 40 / len(text) / math.log(2), rel=1e-4)


def test_without_it_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit) as end:
        lm_eval.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mpop.lm_eval: error: lm_eval") and 'install "lm_eval[hf]"' in line
