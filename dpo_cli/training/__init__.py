"""The optimizer's steps: the run's folder, the optimizer, the loop, the checks before it, the checkpoints."""
