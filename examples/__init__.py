"""Programs that use mofo_jax: read them, run them, take from them."""
