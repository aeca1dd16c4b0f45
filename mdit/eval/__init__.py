"""What a trained model is worth: validation loss, sample pictures, and scores on scenes whose truth is known."""
