"""What a training step costs, measured: rows of figures, and what makes them."""
