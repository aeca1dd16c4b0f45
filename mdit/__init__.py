"""mdit: training MicroDiT, the sparse text-to-image diffusion transformer, on a micro-budget."""

__version__ = "0.1.0"
