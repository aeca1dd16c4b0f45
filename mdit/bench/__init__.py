"""Measurements of training steps: rows of figures, and what makes them."""
