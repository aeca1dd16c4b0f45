"""Expert-choice mixture of experts: every expert takes the same number of tokens from every image."""

import torch
from torch import Tensor, nn

from mdit.kernels import expert_choice
from mdit.models.layers import round_up


class ExpertChoice(nn.Module):
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
        routing = expert_choice.route(self.gate(x_NTD), self.tokens_per_expert(x_NTD.shape[1]))
        hidden_EMF = torch.bmm(expert_choice.gather_tokens(x_NTD, routing), self.w1)
        out_EMD = expert_choice.gelu_bmm(hidden_EMF, self.w2, routing.weights_NEK)
        return expert_choice.scatter_tokens(out_EMD, routing)

    def init_weights(self, out_std: float) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.trunc_normal_(self.w1, std=0.02)
        nn.init.trunc_normal_(self.w2, std=out_std)
