import jax
import pytest

import mofo_jax.counting


@pytest.fixture(scope="module", params=["any device", "one CPU device"])
def program(request):
    """Both ways of searching; the second is never chosen beside simulated devices."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "one CPU device":
            patch.setattr(mofo_jax.counting, "on_one_cpu_device", lambda: True)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()
