"""Programs that measure mofo_jax; each writes its numbers to files."""
