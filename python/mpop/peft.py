"""Light fine-tuning as a method of peft: importing this registers it, and LoRA over MPO layers."""

from mpop.integrations.peft import LightConfig

__all__ = ["LightConfig"]
