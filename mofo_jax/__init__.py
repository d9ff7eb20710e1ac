"""MoFO, the momentum-filtered optimizer (arXiv 2407.20999), for JAX and Optax."""

from mofo_jax._filter import FilterByMomentumState, filter_by_momentum
from mofo_jax._leaves import all_but_norms_and_biases
from mofo_jax._metrics import distance, top_fraction_norm
from mofo_jax._mofo import mofo, scale_by_mofo
from mofo_jax._selection.masks import top_fraction_mask

__version__ = "0.1.0"

__all__ = [
    "FilterByMomentumState",
    "all_but_norms_and_biases",
    "distance",
    "filter_by_momentum",
    "mofo",
    "scale_by_mofo",
    "top_fraction_mask",
    "top_fraction_norm",
]
