"""Commands beside training, each a script: benchmarks, plans, conversions, checks."""
