"""MicroDiT as plain nn.Modules: they know no rank, no process group and no noise schedule."""

from mdit.models.dit import MicroDiT, meta_model

__all__ = ["MicroDiT", "meta_model"]
