"""Exact top-fraction masks of arrays. Knows nothing of optimizers.

Read :mod:`mofo_jax._selection.masks` for what is promised and
:mod:`mofo_jax._selection.search` for how it is done.
"""
