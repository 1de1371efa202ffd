"""Fine-tuning and evaluation on a GLUE task, by the name that users import."""

from mpop.finetuning.task import evaluate, finetune

__all__ = ["evaluate", "finetune"]
