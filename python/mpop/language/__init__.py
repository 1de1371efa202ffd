"""Language models: what they are worth and how they heal."""
