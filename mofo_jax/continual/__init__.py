"""Methods that MoFO is compared and combined with, and the scores of a comparison."""

from mofo_jax.continual._gem import project_gradient
from mofo_jax.continual._hft import half_fine_tuning_mask
from mofo_jax.continual._interpolation import interpolate
from mofo_jax.continual._penalties import (
    add_distance_penalty,
    fisher_diagonal,
)
from mofo_jax.continual._scores import (
    backward_transfer,
    forward_transfer,
    overall_performance,
)

__all__ = [
    "add_distance_penalty",
    "backward_transfer",
    "fisher_diagonal",
    "forward_transfer",
    "half_fine_tuning_mask",
    "interpolate",
    "overall_performance",
    "project_gradient",
]
