import jax
import pytest

from mofo_jax._selection import counting


@pytest.fixture(scope="module", params=["any device", "one CPU device"])
def program(request):
    """Both ways of searching; the second is never chosen beside simulated devices."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "one CPU device":
            patch.setattr(counting, "on_one_cpu_device", lambda: True)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()
