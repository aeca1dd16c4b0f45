"""Fused operations of MicroDiT, imported as `mdit.kernels`. Each lives in a folder of its own beside its reference.

Ops do not import each other, but for `fp8_linear`: its ops are others' with float8 operands, and launch some of their
kernels. What kernels of several ops compute on chip stands in `triton_functions`.
"""
