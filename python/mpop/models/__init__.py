"""The matrices of a transformers model: which there are, how they are held, what trains."""
