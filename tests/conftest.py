"""What holds for every test: eight devices, strict dtypes, few examples."""

import os
from importlib.metadata import version
from pathlib import Path

# Read when JAX starts, so before its import. Eight devices let meshes be tested.
#
# The code generator takes longer over a test's program than the program runs, so these
# flags take the one that is five times as fast. What XLA makes of the program before
# (fusions, memory, collectives) stays the same. XLA_FLAGS of your own take their place:
# the nightly run tests the code that users run.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get(
            "XLA_FLAGS",
            "--xla_backend_optimization_level=0"
            # jaxlib 0.11 does not know the flag any more, and ends.
            + " --xla_cpu_use_fusion_emitters=false"
            * version("jaxlib").startswith("0.10."),
        ),
        "--xla_force_host_platform_device_count=8",
    ]
)

# What a program compiles to depends on it alone, so a second run of the tests, which
# mostly compile, takes half the time. `make clean` forgets it.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build/compiled")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the time of an example vary by a hundred.
hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=50, derandomize=True
)
# With --hypothesis-profile=long, to look for what nobody has found yet.
hypothesis.settings.register_profile("long", deadline=None, max_examples=3000)
hypothesis.settings.load_profile("default")
