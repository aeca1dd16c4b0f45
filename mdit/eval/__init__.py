"""Evaluation of a trained model: validation loss, sample pictures, and scores on scenes whose truth is known."""
