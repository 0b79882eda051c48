"""The same numbers on an NVIDIA GPU as on the CPU: run where there is one."""

import chex
import jax
import numpy as np
import optax
import problems
import pytest

import fptt_jax


def cuda_device() -> jax.Device:
  try:
    return jax.devices('cuda')[0]
  except RuntimeError:
    pytest.skip('needs a CUDA device')


@pytest.mark.gpu
@pytest.mark.parametrize('method', ['fptt', 'bptt', 'ftrl'])
def test_train_step_on_gpu_equals_cpu(method: str) -> None:
  """Ten updates of SGD with full float32 products differ by rounding only, uneven windows and ragged lengths included."""
  device = cuda_device()
  base = optax.sgd(0.1, momentum=0.9)
  optimizer = fptt_jax.fptt(base) if fptt_jax.METHODS[method].regularised else base
  num_windows = None if method == 'bptt' else 3
  batch = problems.regression_batch(20, 6)._replace(lengths=np.array([20, 13, 7, 20, 1, 19], np.int32))
  results = []
  for place in (device, jax.devices('cpu')[0]):
    with jax.default_device(place), jax.default_matmul_precision('float32'):
      trainer = fptt_jax.trainer(
        problems.lstm(hidden=32), fptt_jax.losses.terminal_regression(), optimizer, method=method, num_windows=num_windows
      )
      state = trainer.init(jax.random.key(0), batch)
      for _ in range(4):
        state, metrics = trainer.step(state, batch)
      assert next(iter(metrics.loss.devices())) == place
      results.append(jax.device_get((state.params, state.opt_state, metrics)))
  chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)
