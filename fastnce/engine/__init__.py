"""What is the same for every paper: the step, the optimisers, the loop, checkpoints, logs."""
