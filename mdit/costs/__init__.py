"""Costs of a training step, predicted without running one: FLOPs, kernels, memory, traffic, time, price."""
