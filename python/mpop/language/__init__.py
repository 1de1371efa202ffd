"""Language models: what they are worth."""
