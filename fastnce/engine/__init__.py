"""Training, the same for every method: the step, the optimisers, the loop, checkpoints, logs."""
