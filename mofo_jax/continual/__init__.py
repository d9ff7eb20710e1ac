"""Methods that MoFO is compared and combined with, and measures of forgetting.

All of it works with any model and any training loop.
"""

from mofo_jax.continual._divergence import forward_kl
from mofo_jax.continual._fisher import (
    FactoredFisher,
    fisher_diagonal,
    fisher_probe,
)
from mofo_jax.continual._gem import project_gradient
from mofo_jax.continual._hft import half_fine_tuning_mask
from mofo_jax.continual._interpolation import interpolate
from mofo_jax.continual._matched import (
    Comparison,
    bootstrap_interval,
    compare_at_loss,
    pareto_frontier,
    value_at_loss,
)
from mofo_jax.continual._natural import ScaleByFisherState, scale_by_fisher
from mofo_jax.continual._own_texts import draw_texts
from mofo_jax.continual._penalties import add_distance_penalty
from mofo_jax.continual._scores import (
    backward_transfer,
    forward_transfer,
    overall_performance,
)
from mofo_jax.continual._self_fisher import self_fisher

__all__ = [
    "Comparison",
    "FactoredFisher",
    "ScaleByFisherState",
    "add_distance_penalty",
    "backward_transfer",
    "bootstrap_interval",
    "compare_at_loss",
    "draw_texts",
    "fisher_diagonal",
    "fisher_probe",
    "forward_kl",
    "forward_transfer",
    "half_fine_tuning_mask",
    "interpolate",
    "overall_performance",
    "pareto_frontier",
    "project_gradient",
    "scale_by_fisher",
    "self_fisher",
    "value_at_loss",
]
