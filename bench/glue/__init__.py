"""The method on a real encoder: the table on GLUE, what cutting costs, what gradients need."""
