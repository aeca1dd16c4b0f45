"""Expert-choice mixture of experts: every expert takes the same number of tokens from every image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdit.models.layers import round_up


class ExpertChoiceMoE(nn.Module):
    """E two-layer GELU networks of width F; each sees its K = int(capacity_factor * T / E) best tokens of an image.

    A token may be chosen by several experts (their outputs add up) or by none (its output is zero).
    """

    def __init__(self, dim: int, hidden: int, multiple_of: int, num_experts: int, capacity_factor: float) -> None:
        super().__init__()
        self.num_experts, self.capacity_factor = num_experts, capacity_factor
        width = round_up(hidden, multiple_of)
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, dim))
        self.gate = nn.Linear(dim, num_experts, bias=False)

    def tokens_per_expert(self, num_tokens: int) -> int:
        return int(self.capacity_factor * num_tokens / self.num_experts)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Tokens reach their experts, and come back, by one-hot products, as the released code moves them."""
        p_NTE = self.gate(x_NTD).softmax(dim=-1, dtype=torch.promote_types(x_NTD.dtype, torch.float32))
        weights_NEK, tokens_NEK = p_NTE.transpose(1, 2).topk(self.tokens_per_expert(x_NTD.shape[1]), dim=-1)
        one_hot_NEKT = F.one_hot(tokens_NEK, x_NTD.shape[1]).to(x_NTD.dtype)
        chosen_NEKD = torch.einsum("nekt,ntd->nekd", one_hot_NEKT, x_NTD)
        hidden_NEKF = F.gelu(torch.einsum("nekd,edf->nekf", chosen_NEKD, self.w1))
        out_NEKD = torch.einsum("nekf,efd->nekd", hidden_NEKF, self.w2) * weights_NEK.unsqueeze(-1).to(x_NTD.dtype)
        return torch.einsum("nekt,nekd->ntd", one_hot_NEKT, out_NEKD)

    def init_weights(self, out_std: float) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.trunc_normal_(self.w1, std=0.02)
        nn.init.trunc_normal_(self.w2, std=out_std)
