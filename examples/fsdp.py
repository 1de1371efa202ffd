"""Light fine-tuning of a compressed language model, over as many processes as there are (FSDP2).

Frozen centres and trained cores are sharded alike, and the checkpoint loads on one process.
Run: torchrun --nproc-per-node 2 -m examples.fsdp [FOLDER]
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import mpop

ROWS, STEPS = 16, 30  # rows of all processes together


@contextmanager
def processes():
    """The rank of this process and their number; joined where torchrun started several."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def compressed_model() -> transformers.PreTrainedModel:
    """The same on every process: a small Llama at full rank with frozen centres."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    mpop.compress(model, mpop.CompressionConfig(num_cores=3))
    mpop.freeze_central(model)
    return model


def sharded(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Each decoder layer gathers its cores when it runs; the rest is one more group."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def batch(step: int, rank: int, world: int) -> Tensor:
    """This process's rows of token ids that count up by one."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, 61, (ROWS, 1), generator=generator)
    return ((first + torch.arange(12)) % 61)[rank::world]


def main(argv: list[str] | None = None) -> None:
    """Train, and save the whole model where a folder is given."""
    folder = (argv or [None])[0]
    with processes() as (rank, world):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = compressed_model().to(device)
        if world > 1:
            model = sharded(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.AdamW(trained, 1e-2), []
        for step in range(STEPS):
            ids = batch(step, rank, world).to(device)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if rank == 0:
            print(f"{world} processes, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
            if folder is not None:
                model.save_pretrained(folder, state_dict=state)


if __name__ == "__main__":
    main(sys.argv[1:])
