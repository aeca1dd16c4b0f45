"""The step between two layers of a block, in one pass over the tokens: gated residual add, LayerNorm, modulation.

    x' = x + gate * y
    h  = LayerNorm(x') * weight * (1 + scale) + shift          (normalised over D, no bias)

and, where the patch-mixer ends, the same of the kept tokens alone, so that dropped ones are never written.

All of it waits for memory, so that what counts is how often values are read or written: docs/kernels.md counts them, of
every op. (8 of the 13 values of a kept token are the zeros that dropped tokens have as gradients.)
Backward keeps x', y (with a gate) and two float32 a token; PyTorch keeps the norm's result too, where there is a scale.
It gives dx, dy and the sums over tokens for gate, shift, scale and weight in one pass: in float32, each program's sums
by themselves, then in a fixed order, so that every run gives the same bits.
"""

from torch import Tensor

from mdit.kernels.dispatch import run
from mdit.kernels.patch_mixing import reference


def add_norm_modulate(
    x_NTD: Tensor,
    y_NTD: Tensor | None,
    gate_ND: Tensor | None,
    weight_D: Tensor,
    shift_ND: Tensor | None,
    scale_ND: Tensor | None,
    eps: float,
    keep_NK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (x', h), both (N, T, D), or (N, K, D) of the tokens `keep_NK`.

    Without y x' is x itself (its kept rows), without a gate x + y; without shift and scale h is the plain norm.
    keep_NK: int64 rows of x and y to read, unique in an image, in the order of the outputs. Else all have x's dtype.
    """
    assert y_NTD is None or y_NTD.shape == x_NTD.shape
    assert gate_ND is None or y_NTD is not None, "a gate needs something to let through"
    assert (shift_ND is None) == (scale_ND is None), "shift and scale come together"
    return run(
        "patch_mixing", reference.add_norm_modulate, x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, eps, keep_NK
    )
