"""Latents on disk: the shard format, the global order of samples, and reading ahead."""
