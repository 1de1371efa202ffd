"""Tensor parallelism in two processes, which send each other what SGLang has them send."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
from without_kernels import start, stop

from tests.serving.checkpoints import SPLIT, VOCABULARY, save

IDS = torch.arange(11) * 7 % 150


def one_of_two(rank: int, address: str, folder: Path) -> None:
    start(rank, 2, address)
    from served import load, logits
    from sglang.srt.distributed.parallel_state import get_tp_group

    found = get_tp_group().all_gather(logits(load(folder), IDS), -1)
    torch.save(found[:, :VOCABULARY], folder / f"{rank}.pt")
    stop()


def test_two_processes(tmp_path: Path) -> None:
    dense = save(tmp_path, "llama", **SPLIT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    torch.multiprocessing.spawn(one_of_two, (address, tmp_path), nprocs=2)
    with torch.no_grad():
        want = dense(IDS[None]).logits[0]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), want, rtol=1e-4, atol=1e-4)
