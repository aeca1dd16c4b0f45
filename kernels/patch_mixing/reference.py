"""Plain PyTorch, any floating dtype: the definition, and what runs without Triton."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    if keep_NK is not None:
        rows = _rows(keep_NK, x_NTD.shape[1])  # gathered first: dropped tokens cost nothing
        x_NTD = _gather(x_NTD, rows, keep_NK)
        y_NTD = None if y_NTD is None else _gather(y_NTD, rows, keep_NK)
    if gate_ND is not None:
        x_NTD = torch.addcmul(x_NTD, gate_ND.unsqueeze(1), y_NTD)
    elif y_NTD is not None:
        x_NTD = x_NTD + y_NTD
    h_NTD = F.layer_norm(x_NTD, x_NTD.shape[-1:], weight_D, eps=eps)
    if scale_ND is not None:
        h_NTD = torch.addcmul(shift_ND.unsqueeze(1), h_NTD, 1 + scale_ND.unsqueeze(1))
    return x_NTD, h_NTD


def _rows(keep_NK: Tensor, num_tokens: int) -> Tensor:
    """(N * K,) int64: the kept tokens' rows in x_NTD.flatten(0, 1)."""
    first_N = torch.arange(len(keep_NK), device=keep_NK.device) * num_tokens
    return (keep_NK + first_N.unsqueeze(1)).flatten()


def _gather(x_NTD: Tensor, rows: Tensor, keep_NK: Tensor) -> Tensor:
    return x_NTD.flatten(0, 1).index_select(0, rows).unflatten(0, keep_NK.shape)
