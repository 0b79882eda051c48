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


@pytest.fixture(scope='module')
def kept_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  """What a module's runs compile is read back when another run compiles it again."""
  settings = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('programs')),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  compilation_cache.reset_cache()
  for name, value in settings.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
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
