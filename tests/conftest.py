"""What holds for every test: eight devices, strict dtypes, few examples."""

import os

# Read when JAX starts, so before its import. Eight devices let meshes be tested.
#
# LLVM takes longer to optimise a test's program than the program runs. What XLA makes
# of it before (fusions, memory, collectives) stays the same. A level in XLA_FLAGS wins
# over the one here, as in the nightly run, which tests what users run.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)

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
