"""Settings every test runs under: strict promotion of dtypes and ranks, and JAX's own checks."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')


@pytest.fixture
def x64() -> Iterator[None]:
  """float64 for the length of one test."""
  with jax.enable_x64(True):
    yield
