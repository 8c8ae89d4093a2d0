"""What is preferred: the losses, and where the reference log-probabilities come from."""
