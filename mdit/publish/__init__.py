"""Trained models in the form in which others use them."""
