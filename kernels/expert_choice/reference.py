"""The textbook form of expert choice, with one-hot products; any dtype up to float64. Slow: only for comparison."""

import torch
from torch import Tensor


def expert_choice(x_NTD: Tensor, router_ED: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, tokens_per_expert: int) -> Tensor:
    """Router, dispatch, GELU experts and combination as (N, E, K, T) einsums. -> (N, T, D)"""
    probabilities = torch.einsum("ntd,ed->nte", x_NTD, router_ED).softmax(dim=-1)
    g_NEK, index_NEK = probabilities.transpose(1, 2).topk(tokens_per_expert, dim=-1)
    one_hot = torch.nn.functional.one_hot(index_NEK, x_NTD.shape[1]).to(x_NTD.dtype)
    chosen = torch.einsum("nekt,ntd->nekd", one_hot, x_NTD)
    hidden = torch.nn.functional.gelu(torch.einsum("nekd,edf->nekf", chosen, w1_EDF))
    out = torch.einsum("nekf,efd->nekd", hidden, w2_EFD) * g_NEK.unsqueeze(-1)
    return torch.einsum("nekt,nekd->ntd", one_hot, out)
