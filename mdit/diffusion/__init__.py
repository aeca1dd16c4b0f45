"""Targets (EDM, rectified flow), loss and samplers, for any callable network; knows no model."""
