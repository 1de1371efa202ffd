"""Light fine-tuning of a compressed language model in accelerate's loop, on one process or several.

Nothing in the loop knows of MPOs. ACCELERATE_MIXED_PRECISION=bf16 is autocast.
Run: torchrun --nproc-per-node 2 -m examples.accelerated [FOLDER]; ACCELERATE_USE_CPU=1 on a CPU.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

from examples.fsdp import ROWS, STEPS, batch, compressed_model


def main(argv: list[str] | None = None) -> None:
    """Train, and save the model where a folder is given."""
    folder = (argv or [None])[0]
    # A batch is shared out, so that the same rows are seen whatever the number of processes.
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    rows = torch.cat([batch(step, rank=0, world=1) for step in range(STEPS)])
    model = compressed_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(rows, batch_size=ROWS)
    )
    losses = []
    for ids in loader:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    accelerator.print(
        f"{accelerator.num_processes} processes, {accelerator.mixed_precision} mixed precision, "
        f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    )
    if folder is not None:
        accelerator.unwrap_model(model).save_pretrained(
            folder, is_main_process=accelerator.is_main_process
        )


if __name__ == "__main__":
    main(sys.argv[1:])
