"""Training a model on a task, and squeezing it while the task's metric holds."""
