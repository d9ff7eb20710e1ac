"""Optax's own tests for contributed optimizers, run with MoFO in their list."""

import functools
import importlib.util
import inspect
import sys
import types

import jax
import pytest
from optax import contrib
from optax._src import base

import mofo_jax

OPTIMIZERS = [
    {"opt_name": "mofo", "opt_kwargs": {"learning_rate": 1e-2}},
    {"opt_name": "mofo", "opt_kwargs": {"learning_rate": 1e-2, "alpha": 0.4}},
    {
        "opt_name": "mofo",
        "opt_kwargs": {"learning_rate": 1e-2, "weight_decay": 1e-6, "mu_dtype": None},
    },
]


def load_suite() -> types.ModuleType:
    """The suite with its lists replaced before its test class is made from them."""
    spec = importlib.util.find_spec("optax.contrib._common_test")
    assert spec is not None and spec.origin is not None
    with open(spec.origin) as file:
        source = file.read()
    lists, separator, tests = source.partition("class ContribTest(")
    assert separator
    module = types.ModuleType("optax_contrib_common_test")
    sys.modules[module.__name__] = module  # absl looks its test classes up there
    exec(compile(lists, spec.origin, "exec"), module.__dict__)
    cases = [{**o, "wrapper_name": None, "wrapper_kwargs": None} for o in OPTIMIZERS]
    module._MAIN_OPTIMIZERS_UNDER_TEST = tuple(cases)
    mechanized = {
        "opt_name": "mofo",
        "opt_kwargs": {"learning_rate": 1.0},
        "wrapper_name": "mechanize",
        "wrapper_kwargs": {"weight_decay": 0.0},
    }
    module._ALL_OPTIMIZERS_UNDER_TEST = (*cases, mechanized)
    exec(compile(separator + tests, spec.origin, "exec"), module.__dict__)
    return module


@functools.wraps(mofo_jax.mofo)
def mofo(*args, **kwargs):
    return mofo_jax.mofo(*args, **kwargs)


# The suite tries schedules only where the annotation is this very one, without None.
signature = inspect.signature(mofo_jax.mofo)
parameters = dict(signature.parameters)
parameters["learning_rate"] = parameters["learning_rate"].replace(
    annotation=base.ScalarOrSchedule
)
mofo.__signature__ = signature.replace(parameters=list(parameters.values()))


@pytest.fixture(autouse=True, scope="module")
def mofo_in_contrib():
    # The suite looks optimizers up by name in optax.contrib; and neither it nor
    # Optax is written for strict promotion.
    patch = pytest.MonkeyPatch()
    patch.setattr(contrib, "mofo", mofo, raising=False)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    patch.undo()


ContribTest = load_suite().ContribTest
