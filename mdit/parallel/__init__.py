"""How a run is laid out on machines; applied to a plain model from outside."""
