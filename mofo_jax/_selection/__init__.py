"""Exact top-fraction masks of arrays. Knows nothing of optimizers."""

from mofo_jax._selection.masks import no_guess, select_masks, top_fraction_mask

__all__ = ["no_guess", "select_masks", "top_fraction_mask"]
