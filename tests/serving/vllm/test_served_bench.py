"""The bench of a served decoder, on a small one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.language import served
from tests.serving.checkpoints import CASES, save


def test_a_served_model_is_timed_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    name, options = CASES["interpolative form in int8"]
    save(tmp_path / "small", name, **options).save_pretrained(tmp_path / "dense")
    for file in (tmp_path / "small").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "dense")
    (tmp_path / "text.txt").write_text(" ".join(f"w{k % 150}" for k in range(40)))
    output = tmp_path / "served.json"
    models = [str(tmp_path / which) for which in ("small", "dense")]
    asked = ["--prompts", "3", "--length", "5", "--new-tokens", "4", "--repeats", "1"]
    files = ["--text", str(tmp_path / "text.txt"), "--output", str(output)]
    served.main(["--models", *models, *files, *asked])
    found = json.loads(output.read_text())
    assert set(found["models"]) == {"small", "dense"}
    for model in found["models"].values():
        assert model["prompts_with_the_same_tokens"] == 3
        assert min(model["new_tokens_per_second"].values()) > 0
