"""Layout of a run on machines, applied to a plain model from outside."""
