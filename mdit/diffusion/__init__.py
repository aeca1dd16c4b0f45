"""EDM: preconditioning, loss and sampler, for any callable network; knows no model."""
