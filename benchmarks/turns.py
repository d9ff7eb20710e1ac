"""Optimizers' steps timed in turns: their ratios hold also where a machine is noisy."""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.trees import Shapes

# Gradients by step, from a fixed direction and fresh noise.
GRADIENTS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "ordinary": lambda step, fixed, noise: fixed + 3 * noise,
    "scale jumps by 1e3": lambda step, fixed, noise: (
        jnp.where(step % 2 == 0, 1.0, 1e3) * (fixed + 3 * noise)
    ),
    "all magnitudes equal": lambda step, fixed, noise: (
        jnp.sign(fixed) * (1 + 0.1 * step.astype(jnp.float32))
    ),
    "99% exact zeros": lambda step, fixed, noise: (
        (fixed + 3 * noise) * (jnp.abs(fixed) > 2.576)
    ),
    "bfloat16 moments": lambda step, fixed, noise: fixed + 3 * noise,
}


# The momentum grows from zero in the first steps, and the thresholds with it.
WARMUP = 15


def step_of(optimizer: optax.GradientTransformation) -> Any:
    """A jitted function of parameters, state and gradients."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def time_in_turns(
    optimizers: dict[str, optax.GradientTransformation],
    shapes: Shapes,
    gradients: str,
    repeats: int,
) -> dict[str, list[float]]:
    """Milliseconds of each step, all optimizers on the same gradients in turns."""
    runs, inputs = prepare(optimizers, shapes, gradients, WARMUP + repeats)
    return take_turns(runs, inputs, WARMUP)


def prepare(
    optimizers: dict[str, optax.GradientTransformation],
    shapes: Shapes,
    gradients: str,
    steps: int,
) -> tuple[dict[str, list[Any]], Iterable[Any]]:
    """What :func:`take_turns` takes, and the gradients of so many steps."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    ends = list(itertools.accumulate(sizes))

    def normal(seed: jax.Array) -> dict[str, jax.Array]:
        # In one draw: a program with one a leaf takes a GPU's compiler a minute.
        flat = jax.random.normal(jax.random.key(seed), (ends[-1],))
        leaves = jnp.split(flat, ends[:-1])
        pairs = zip(shapes.items(), leaves, strict=True)
        return {name: leaf.reshape(shape) for (name, shape), leaf in pairs}

    fixed = jax.jit(normal)(0)

    @jax.jit
    def gradient(step: jax.Array) -> Any:
        by_step = functools.partial(GRADIENTS[gradients], step)
        return jax.tree.map(lambda f, n: 1e-3 * by_step(f, n), fixed, normal(step + 1))

    runs = {}
    for name, optimizer in optimizers.items():
        params = jax.tree.map(jnp.zeros_like, fixed)
        runs[name] = [step_of(optimizer), params, jax.jit(optimizer.init)(params)]
    return runs, (gradient(jnp.int32(i)) for i in range(steps))


def take_turns(
    runs: dict[str, list[Any]],
    inputs: Iterable[Any],
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of the steps of each run: ``[step, params, state]``.

    Times are those of ``clock``, in seconds, with the first ``warmup`` left out.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for given in inputs:
        jax.block_until_ready(given)
        for name, run in runs.items():
            step, params, state = run
            start = clock()
            run[1:] = jax.block_until_ready(step(params, state, given))
            times[name].append(1e3 * (clock() - start))
    return {name: values[warmup:] for name, values in times.items()}


def ratios(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and median and quartiles of the ratio to adamw's step of the turn."""
    result: dict[str, Any] = {}
    for name, values in times.items():
        pairs = zip(values, times["adamw"], strict=True)
        found = [value / base for value, base in pairs]
        low, ratio, high = np.quantile(found, (0.25, 0.5, 0.75)).tolist()
        result[name] = {"ms": statistics.median(values), "ratio": ratio}
        result[name] |= {"quartiles": [low, high]}
    return result
