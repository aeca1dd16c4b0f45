"""Weights on disk: training states to resume from, snapshots to use."""
