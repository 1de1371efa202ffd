"""Tensor parallelism, and vLLM's server, each in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served import NEW_TOKENS, PROMPTS, expected, generated, served

from tests.serving.checkpoints import SPLIT, save

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SPLIT),
    "tied, factors chosen": (
        "qwen3-tied",
        {"compression": 0.6, "factors": "auto", "tensor_parallel": 2},
    ),
    # Queries, keys and values are one matrix in the checkpoint: three ranges of two halves.
    "fused on disk": ("gpt2", {"compression": 0.9, "tensor_parallel": 6}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    model = save(tmp_path / "model", name, **options)
    devices = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with served(tmp_path / "model", enforce_eager=case != "llama", **devices) as llm:
        found = generated(llm)
    for (tokens, logprobs), (want, want_logprobs) in zip(found, expected(model), strict=True):
        assert tokens == want
        assert logprobs == pytest.approx(want_logprobs, abs=1e-4)


def test_factors_that_do_not_divide_say_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    odd = {"*.down_proj": {"in_factors": (11, 16), "out_factors": (8, 12)}}
    save(tmp_path / "model", "llama", overrides=odd, include=list(odd))
    devices = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with pytest.raises(RuntimeError), served(tmp_path / "model", enforce_eager=True, **devices):
        pass
    assert "mpop compress --tensor-parallel 2" in capfd.readouterr().out  # of the processes


def newer(config: dict[str, Any]) -> None:
    config["quantization_config"]["version"] += 1


def as_it_is(config: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (newer, "format version 2.*reads 1 to 1: upgrade mpop"),
        (as_it_is, r"bert.pooler.dense: .*mpop compress --exclude '\*pooler.dense'"),
    ],
)
def test_said_where_vllm_is_called(
    edit: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    save(tmp_path, "bert-classifier")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message), served(tmp_path, runner="pooling"):
        pass


def test_the_server(tmp_path: Path) -> None:
    path = tmp_path / "model"
    model = save(path, "llama", compression=0.6)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; the CPU package's own command looks for a package of another name.
    module = "vllm.entrypoints.openai.api_server"
    options = "--dtype float32 --max-model-len 64 --kv-cache-memory-bytes 16777216 --enforce-eager"
    address = f"--host 127.0.0.1 --port {port}"
    command = [sys.executable, "-m", module, "--model", str(path), *address.split()]
    command += options.split()
    url = f"http://127.0.0.1:{port}"
    body = {
        **{"model": str(path), "prompt": PROMPTS[0], "temperature": 0, "ignore_eos": True},
        "max_tokens": NEW_TOKENS,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    server = subprocess.Popen(command, env=os.environ)
    try:
        for _ in range(300):
            assert server.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["text"]
    finally:
        server.terminate()
        server.wait(60)
    assert text.split() == [f"w{token}" for token in expected(model)[0][0]]
