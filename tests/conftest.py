"""Settings that tests run under."""

from collections.abc import Iterator
import gc
import os

import helpers
import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

# XLA_FLAGS= in the environment leaves programs as users have them, and takes twice the
# time.
os.environ.setdefault('XLA_FLAGS', helpers.QUICK_FLAGS)

# Silent broadcasting between ranks is an error in every test. Strict promotion of
# dtypes is a fixture: optax's Adam needs it off.
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Simulated devices, for the tests that split a batch.
jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture(scope='module', autouse=True)
def freeze_objects() -> Iterator[None]:
  """Spares the garbage collector the gigabytes of programs that earlier tests left."""
  yield
  gc.collect()
  gc.freeze()


@pytest.fixture(scope='session', autouse=True)
def keep_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
  """What one test compiles is read back where another test needs it."""
  folder = tmp_path_factory.mktemp('programs')
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  # Programs that were compiled while tests were collected settled where to look.
  compilation_cache.reset_cache()


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
  """No implicit promotion of dtypes for the length of one test."""
  with jax.numpy_dtype_promotion('strict'):
    yield


@pytest.fixture
def x64() -> Iterator[None]:
  """float64 for the length of one test."""
  with helpers.default_float64():
    yield
