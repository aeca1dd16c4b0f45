"""Making sets: pictures and captions -> latent shards, for a recipe or for a data set of any size."""

from mdit.prepare.recipe import is_prepared, prepare

__all__ = ["is_prepared", "prepare"]
