"""Language models: what they are worth, how they heal, and squeezing them on text."""
