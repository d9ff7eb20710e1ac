import pytest

from mofo_jax.testing import search_program


@pytest.fixture(params=["any device", "one CPU device"])
def program(request):
    """Both ways of searching; the second is never chosen beside simulated devices."""
    with search_program(request.param):
        yield request.param
