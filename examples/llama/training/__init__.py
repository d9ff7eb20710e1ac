"""A training run: its settings, steps, loop, checkpoints and results."""
