"""How long a text of a transformers model may be."""

from __future__ import annotations

from transformers import PreTrainedModel


def longest(model: PreTrainedModel) -> int | None:
    """Tokens of the longest text that the model has positions for; None where it takes any."""
    config = model.config.get_text_config()
    # T5 has none of these, XLNet -1, and MPT a name of its own.
    names = ("max_position_embeddings", "max_seq_len")
    positions = next((count for name in names if (count := getattr(config, name, None))), 0)
    if positions < 1:
        return None
    # RoBERTa and its relatives count from behind the padding's.
    paddings = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return positions - max(paddings, default=0)
