"""Making sets: pictures and captions -> latent shards, for a recipe or for a data set of any size."""

from mdit.precompute.recipe import is_precomputed, precompute

__all__ = ["is_precomputed", "precompute"]
