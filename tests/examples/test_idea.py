"""The picture of the idea."""

import jax
import numpy as np
import pytest
from matplotlib import image

from examples.idea import Args, draw, momentum_and_updates


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax.adamw divides float by int
def test_what_moves_is_what_has_the_largest_momentum(tmp_path):
    args = Args(output=tmp_path / "idea.png", alpha=0.2)
    found = momentum_and_updates(args)
    moved = found["mofo"] > 0
    assert moved.sum() == int(0.2 * moved.size) and (found["adam"] > 0).all()
    assert found["momentum"][moved].min() >= found["momentum"][~moved].max()
    np.testing.assert_allclose(found["mofo"][moved], found["adam"][moved], rtol=1e-5)
    draw(found, args.alpha, args.output)
    picture = image.imread(args.output)
    assert picture.shape[1] > 1000 and picture.std() > 0.05
