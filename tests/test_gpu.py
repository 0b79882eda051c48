"""The same numbers on an NVIDIA GPU as on the CPU: run where there is one."""

import functools

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.benchmark import cases, ours, rivals_torch
import fptt_jax
from fptt_jax import nn
from fptt_jax.nn.kernels import cuda


def cuda_device() -> jax.Device:
  try:
    return jax.devices('cuda')[0]
  except RuntimeError:
    pytest.skip('needs a CUDA device')


@pytest.mark.gpu
@pytest.mark.parametrize('method', ['fptt', 'bptt', 'ftrl'])
def test_train_step_on_gpu_equals_cpu(method: str) -> None:
  """Ten updates of SGD with full float32 products differ by rounding only, uneven
  windows and ragged lengths included.
  """
  device = cuda_device()
  base = optax.sgd(0.1, momentum=0.9)
  optimizer = fptt_jax.fptt(base) if fptt_jax.METHODS[method].regularized else base
  num_windows = None if method == 'bptt' else 3
  batch = helpers.regression_batch(20, 6)._replace(
    lengths=np.array([20, 13, 7, 20, 1, 19], np.int32)
  )
  results = []
  for place in (device, jax.devices('cpu')[0]):
    with jax.default_device(place), jax.default_matmul_precision('float32'):
      trainer = fptt_jax.make_trainer(
        helpers.lstm(hidden=32),
        fptt_jax.losses.terminal_regression(),
        optimizer,
        method=method,
        num_windows=num_windows,
      )
      state = trainer.init(jax.random.key(0), batch)
      for _ in range(4):
        state, metrics = trainer.step(state, batch)
      assert next(iter(metrics.loss.devices())) == place
      results.append(jax.device_get((state.params, state.opt_state, metrics)))
  chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('members', [1, 3])
@pytest.mark.parametrize('batch_size', [5, 128])
@pytest.mark.parametrize('hidden', cuda.SIZES)
@pytest.mark.parametrize('layer', [nn.LSTM, nn.GRU])
def test_kernel_on_gpu_equals_the_fused_scan(
  layer: type[nn.LSTM | nn.GRU], hidden: int, batch_size: int, members: int
) -> None:
  """Outputs, final state and all gradients of a ragged window of 28 steps, which
  rounding of float32 sums alone tells apart.
  """
  device = cuda_device()
  if not cuda.is_available():
    pytest.skip('needs nvcc')
  results = []
  with jax.default_device(device), jax.default_matmul_precision('float32'):
    draw = lambda seed, *shape: jax.random.normal(
      jax.random.key(seed), (members, *shape)
    )
    mask = (
      jax.random.bernoulli(jax.random.key(0), 0.7, (28, batch_size)).at[:, 0].set(False)
    )
    for implementation in ('cuda', 'custom_vjp'):
      build = functools.partial(layer, 3, hidden, implementation=implementation)
      run = nn.from_nnx(lambda rngs, build=build: build(rngs=rngs))

      def total(params, state, x, weights, run=run):
        end, y = run.apply(params, state, x, mask, None)
        ends = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(end))
        return jnp.sum(weights * jnp.where(mask[..., None], y, 0)) + ends, (end, y)

      step = jax.jit(
        jax.vmap(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
      )
      params = jax.vmap(run.init)(jax.random.split(jax.random.key(1), members))
      leaves, structure = jax.tree.flatten(run.initial_state(batch_size))
      state = structure.unflatten(
        draw(2 + number, *leaf.shape) for number, leaf in enumerate(leaves)
      )
      results.append(
        jax.device_get(
          step(
            params, state, draw(4, 28, batch_size, 3), draw(5, 28, batch_size, hidden)
          )
        )
      )
  for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(
      got, expected, rtol=0, atol=5e-5 * max(1, np.abs(expected).max())
    )


@pytest.mark.gpu
def test_cuda_graph_trains_what_the_loop_does() -> None:
  """The benchmark's captured batch, after the three that capturing runs, against as
  many steps of the loop it captures.
  """
  cuda_device()
  torch = pytest.importorskip('torch')
  if not torch.cuda.is_available():
    pytest.skip('needs PyTorch with CUDA')
  case = cases.Case('', 12, 3, 4, 2, 32, 3)
  weights = jax.tree.map(
    np.array,
    ours.make_model(case, lambda rngs: nn.LSTM(2, 32, rngs=rngs)).init(
      jax.random.key(0)
    ),
  )
  inputs, targets = cases.draw(case)
  data = rivals_torch.tensors(inputs, targets, device='cuda')
  loop, graph = (
    rivals_torch.torch_loop(case, kind, weights, device='cuda')
    for kind in ('optimized', 'graph')
  )
  for _ in range(3):
    loop(*data)
  for other in (
    data,
    rivals_torch.tensors(1 - inputs, targets[::-1].copy(), device='cuda'),
  ):
    np.testing.assert_allclose(graph(*other), loop(*other), rtol=1e-4)
