"""MicroDiT as plain nn.Modules: they know no rank, no process group and no noise schedule."""

from mdit.models.dit import MicroDiT

__all__ = ["MicroDiT"]
