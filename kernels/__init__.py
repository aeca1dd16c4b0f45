"""Fused operations of MicroDiT, imported as `mdit.kernels`. Each lives in a folder of its own beside its reference."""
