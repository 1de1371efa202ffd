"""Drop-in modules over the operators: what replaces ``nn.Linear`` and ``nn.Embedding``."""
