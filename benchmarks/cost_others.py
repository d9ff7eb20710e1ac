"""Other ways to MoFO's update than ours, timed beside it and optax.adamw."""

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.trees import Shapes
from benchmarks.turns import ratios, time_in_turns
from mofo_jax import mofo, top_fraction_mask


def mask_optimizer(
    mask: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformation:
    """Adam with another way to select."""
    adam = optax.scale_by_adam()

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        updates, state = adam.update(gradients, state, params)
        keep = lambda u, m: jnp.where(mask(m), -1e-3 * u, 0)
        return jax.tree.map(keep, updates, state.mu), state

    return optax.GradientTransformation(adam.init, update)


def by_full_sort(x: jax.Array) -> jax.Array:
    """The mask, ties aside."""
    magnitudes = jnp.abs(x)
    return magnitudes >= jnp.sort(magnitudes.reshape(-1))[-max(1, x.size // 10)]


def others(shapes: Shapes, repeats: int) -> dict[str, Any]:
    """Other ways to the same update, on one leaf."""
    top_k = functools.partial(top_fraction_mask, alpha=0.1, method="top_k")
    optimizers = {
        "adamw": optax.adamw(1e-3),
        "mofo": mofo(1e-3),
        "jax.lax.top_k's mask": mask_optimizer(top_k),
        "a full sort": mask_optimizer(by_full_sort),
        "mofo, scheduled alpha": mofo(1e-3, alpha=optax.linear_schedule(0.2, 0.1, 100)),
        "mofo, injected hyperparameters": optax.inject_hyperparams(mofo)(1e-3),
        "adamw, injected hyperparameters": optax.inject_hyperparams(optax.adamw)(1e-3),
    }
    result = ratios(time_in_turns(optimizers, shapes, "ordinary", repeats))
    return result | _torch(shapes["w"], repeats, result["adamw"]["ms"])


def _torch(shape: tuple[int, ...], repeats: int, base: float) -> dict[str, Any]:
    """PyTorch's AdamW, and MoFO as its authors wrote it, where it is installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(os.cpu_count() or 1)
    fixed = torch.randn(shape)

    def run(step: Callable[[], None], parameter: Any) -> dict[str, Any]:
        times = []
        for _ in range(5 + repeats):
            parameter.grad = 1e-3 * (fixed + 3 * torch.randn(shape))
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        ms = statistics.median(times[5:])
        return {"ms": ms, "ratio": ms / base}

    def adamw(**kind: bool) -> dict[str, Any]:
        parameter = torch.nn.Parameter(torch.zeros(shape))
        return run(torch.optim.AdamW([parameter], **kind).step, parameter)

    parameter = torch.nn.Parameter(torch.zeros(shape))
    m, v = torch.zeros(shape), torch.zeros(shape)

    @torch.no_grad()
    def released() -> None:
        m.mul_(0.9).add_(parameter.grad, alpha=0.1)
        v.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
        magnitudes = m.abs()
        k = int(0.1 * m.numel())
        threshold = torch.topk(magnitudes.flatten(), k, sorted=False).values.min()
        kept = torch.where(magnitudes >= threshold, m, 0)
        parameter.addcdiv_(kept, v.sqrt().add_(1e-8), value=-1e-3)

    return {
        "torch fused AdamW": adamw(fused=True),
        "torch foreach AdamW": adamw(foreach=True),
        "torch.topk, as released": run(released, parameter),
    }
