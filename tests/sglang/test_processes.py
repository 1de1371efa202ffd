"""Tensor parallelism in two processes, which send each other what SGLang has them send."""

from __future__ import annotations

import socket
from pathlib import Path

import torch

OPTIONS = {
    "compression": 0.7,
    "tensor_parallel": 4,
    "include": ["model.*", "lm_head"],
    "exclude": ["*.0.self_attn.k_proj", "lm_head"],
}
IDS = torch.arange(11) * 7 % 150


def one_of_two(rank: int, address: str, folder: Path) -> None:
    from without_kernels import start, stop

    start(rank, 2, address)
    from served import VOCABULARY, load, logits
    from sglang.srt.distributed.parallel_state import get_tp_group

    found = get_tp_group().all_gather(logits(load(folder), IDS), -1)
    torch.save(found[:, :VOCABULARY], folder / f"{rank}.pt")
    stop()


def test_two_processes(tmp_path: Path) -> None:
    """One head of keys and values, which both hold; a head of 150 words, padded to 192."""
    from served import save

    dense = save(tmp_path, "llama", **OPTIONS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    torch.multiprocessing.spawn(one_of_two, (address, tmp_path), nprocs=2)
    with torch.no_grad():
        want = dense(IDS[None]).logits[0]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), want, rtol=1e-4, atol=1e-4)
