"""Training: the loop, the DeepSpeed engine behind it, EMA, checkpoints for resume, and metrics."""
