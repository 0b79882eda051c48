"""CUDA kernels, emulated on the CPU, equal the scans that they replace."""

import ctypes
import functools
import re
import shutil
import subprocess

from flax import nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.benchmark import gpu_day
import fptt_jax
from fptt_jax import nn
from fptt_jax.nn.cells import gru, lstm
from fptt_jax.nn.kernels import cuda

D = 3
LAYERS = {'LSTM': nn.LSTM, 'GRU': nn.GRU}


@pytest.fixture(scope='module', autouse=True)
def emulated(tmp_path_factory):
  """Compile the kernels for the CPU into a temporary cache."""
  if jax.default_backend() != 'cpu':
    pytest.skip('emulation needs the CPU to be the default backend')
  if not shutil.which('g++'):
    pytest.skip('emulation needs g++')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('FPTT_JAX_CACHE_DIR', str(tmp_path_factory.mktemp('cache')))
    for cell in LAYERS:
      cuda.build(cell, 'cpu')


def layer(cell, hidden, implementation):
  build = functools.partial(LAYERS[cell], D, hidden, implementation=implementation)
  return nn.from_nnx(lambda rngs: build(rngs=rngs))


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def initial_state(run, batch_size, shape=()):
  """Draw a state that is not zero."""
  leaves, structure = jax.tree.flatten(run.initial_state(batch_size))
  return structure.unflatten(
    draw(1 + number, *shape, *leaf.shape) / 2 for number, leaf in enumerate(leaves)
  )


def results(cell, hidden, implementation, num_steps, batch_size, mask, members=None):
  """Return a window's results and the gradients in weights, initial state
  and inputs.
  """
  run = layer(cell, hidden, implementation)
  shape = () if members is None else (members,)

  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  def total(params, state, x):
    end, y = run.apply(params, state, x, mask, None)
    y = y if mask is None else jnp.where(mask[..., None], y, 0)
    return jnp.sum(draw(3, *y.shape) * y) + sum(
      jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(end)
    ), (end, y)

  weights = jax.eval_shape(run.init, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf: draw(0, *shape, *leaf.shape) / hidden**0.5, weights
  )
  state, x = (
    initial_state(run, batch_size, shape),
    draw(4, *shape, num_steps, batch_size, D),
  )
  return helpers.quick(total if members is None else jax.vmap(total))(params, state, x)


# float32 rounds sums of up to 512 products to about 1e-6, and 20 steps pass that on.
def assert_close(got, expected, tolerance=2e-5):
  helpers.assert_close(got, expected, tolerance)


def ragged(num_steps, batch_size):
  """Draw a mask with holes, a row without valid steps and a full last row."""
  mask = draw(5, num_steps, batch_size) > -0.3
  mask[:, 0], mask[:, -1] = False, True
  return mask


@pytest.mark.parametrize('hidden', cuda.SIZES)
@pytest.mark.parametrize(
  ('num_steps', 'batch_size', 'masked'),
  [(20, 2, False), (4, 3, True), (1, 5, False), (7, 5, True)],
  ids=['long', 'masked', 'two rows a block, one step', 'two rows a block, masked'],
)
@pytest.mark.parametrize('cell', LAYERS)
def test_kernel_equals_both_scans(cell, hidden, num_steps, batch_size, masked):
  """Outputs, final state and all gradients agree. Up to 4 rows have a block each; of
  five rows two blocks hold two each and one holds one.
  """
  mask = ragged(num_steps, batch_size) if masked else None
  got = results(cell, hidden, 'cuda', num_steps, batch_size, mask)
  for implementation in ('custom_vjp', 'scan'):
    assert_close(
      got, results(cell, hidden, implementation, num_steps, batch_size, mask)
    )


@pytest.mark.parametrize('cell', LAYERS)
def test_a_row_without_steps_keeps_its_state(cell):
  """The state is equal bit for bit. Its gradient passes unchanged and the
  inputs' is 0.
  """
  mask = jnp.array([[False, True, False]] * 4)
  ((_, (end, _)), (_, d_state, dx)) = results(cell, 32, 'cuda', 4, 3, mask)
  state = initial_state(layer(cell, 32, 'cuda'), 3)
  for leaf, d_leaf, first in zip(
    *map(jax.tree.leaves, (end, d_state, state)), strict=True
  ):
    np.testing.assert_array_equal(leaf[::2], first[::2])
    np.testing.assert_allclose(d_leaf[::2], np.cos(first[::2]), rtol=1e-6)
  np.testing.assert_array_equal(dx[:, ::2], 0)


@pytest.mark.parametrize('cell', LAYERS)
def test_population_with_their_own_weights(cell):
  """Under vmap all operands get a member axis, including the shared mask."""
  mask = ragged(4, 3)
  assert_close(
    results(cell, 32, 'cuda', 4, 3, mask, members=3),
    results(cell, 32, 'custom_vjp', 4, 3, mask, members=3),
  )


@pytest.mark.parametrize('cell', LAYERS)
def test_population_of_members(cell):
  """All leading axes are members."""
  run = layer(cell, 32, 'cuda')
  params, x = (
    jax.vmap(jax.vmap(run.init))(jax.random.split(jax.random.key(0), (2, 3))),
    draw(1, 2, 3, 4, 2, D),
  )
  apply = jax.jit(
    lambda params, x: run.apply(params, run.initial_state(2), x, None, None)[1]
  )
  got = jax.jit(jax.vmap(jax.vmap(apply)))(params, x)
  for i, j in np.ndindex(2, 3):
    assert_close(
      got[i, j], apply(jax.tree.map(lambda leaf: leaf[i, j], params), x[i, j])
    )


@functools.cache
def trained(cell, implementation, mesh=None):
  """Return the state after two FPTT steps on ragged windows of three and four steps."""
  run = nn.from_nnx(
    lambda rngs: nn.Sequential(
      LAYERS[cell](D, 32, implementation=implementation, rngs=rngs),
      nnx.Linear(32, 1, rngs=rngs),
    )
  )
  optimizer = fptt_jax.fptt(optax.sgd(0.1, momentum=0.9), alpha=0.5)
  trainer = helpers.quick_trainer(
    run, fptt_jax.losses.terminal_regression(), optimizer, num_windows=5, mesh=mesh
  )
  batch = helpers.regression_batch(19, 6, D)._replace(
    lengths=np.array([19, 13, 7, 18, 1, 19], np.int32)
  )
  state = trainer.init(jax.random.key(0), batch)
  for _ in range(2):
    state, metrics = trainer.step(state, batch)
  return state.params, state.opt_state, metrics


@pytest.mark.parametrize('devices', [1, 2])
@pytest.mark.parametrize('cell', LAYERS)
def test_training_equals_the_fused_scan(cell, devices):
  """A train step agrees on one device and with the batch split over two."""
  mesh = (
    None if devices == 1 else jax.sharding.Mesh(jax.devices()[:devices], ('batch',))
  )
  assert_close(trained(cell, 'cuda', mesh), trained(cell, 'custom_vjp'))


# Errors.


@pytest.mark.parametrize(
  ('build', 'error', 'message'),
  [
    (
      lambda rngs: nn.LSTM(D, 32, implementation='triton', rngs=rngs),
      ValueError,
      r"implementation .*'triton'",
    ),
    (
      lambda rngs: nn.ElmanRNN(D, 32, implementation='cuda', rngs=rngs),
      ValueError,
      r'implementation .*ElmanRNN',
    ),
    (
      lambda rngs: nn.LRU(D, 32, implementation='cuda', rngs=rngs),
      ValueError,
      r'implementation .*LRU',
    ),
    (
      lambda rngs: nn.LSTM(D, 48, implementation='cuda', rngs=rngs),
      ValueError,
      r'hidden_features .* LSTM, got 48',
    ),
    (
      lambda rngs: nn.GRU(D, 48, implementation='cuda', rngs=rngs),
      ValueError,
      r'hidden_features .* GRU, got 48',
    ),
    (
      lambda rngs: nn.LSTM(
        D, 32, implementation='cuda', param_dtype=jnp.bfloat16, rngs=rngs
      ),
      TypeError,
      r'param_dtype .* LSTM, got bfloat16',
    ),
  ],
)
def test_layers_without_a_kernel_raise(build, error, message):
  """The error names the argument and the layer when the layer is built."""
  with pytest.raises(error, match=message):
    nn.from_nnx(build)


def test_states_of_other_shapes_raise():
  """A kernel would read beyond them, so layer and kernel both check."""
  run = layer('LSTM', 32, 'cuda')
  params, x = run.init(jax.random.key(0)), draw(1, 4, 3, D)
  with pytest.raises(ValueError, match=r'state\.h .*float32\[2, 32\]'):
    run.apply(params, run.initial_state(2), x, None, None)

  def run_kernel(state):
    return lstm.CUDA_KERNEL.forward(
      (None, params['w_h']), state, draw(1, 4, 3, 4 * 32), None
    )

  with pytest.raises(ValueError, match=r'^h .*\(3, 32\).*\(2, 32\)'):
    run_kernel(run.initial_state(2))
  halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), run.initial_state(3))
  with pytest.raises(TypeError, match=r'float32 .*bfloat16'):
    run_kernel(halves)


def test_weights_of_other_shapes_raise():
  """The layer never makes them, but a kernel would read beyond them."""
  weights = None, draw(1, 32, 96), None, draw(1, 1, 32)
  with pytest.raises(ValueError, match=r'recurrent_bias .*\(96,\).*\(32,\)'):
    gru.CUDA_KERNEL.forward(weights, draw(1, 3, 32), draw(1, 4, 3, 96), None)


def test_other_platforms_raise(monkeypatch):
  """A CPU without the emulation cannot run the kernels."""
  monkeypatch.setattr(cuda, '_built', set())
  run = layer('LSTM', 32, 'cuda')
  with pytest.raises(RuntimeError, match=r"implementation='cuda' .*'cpu'"):
    run.apply(
      run.init(jax.random.key(0)), run.initial_state(3), draw(1, 4, 3, D), None, None
    )


def test_a_missing_compiler_is_named(monkeypatch):
  """The error names the compiler and the places searched."""
  monkeypatch.setenv('PATH', '')
  monkeypatch.delenv('CUDA_HOME', raising=False)
  with pytest.raises(RuntimeError, match=r'nvcc.* PATH .*\$CUDA_HOME/bin'):
    cuda.compile_command('LSTM', 'CUDA', 'sm_90')
  assert not cuda.is_available()


def test_a_failed_compilation_shows_the_compiler_output(monkeypatch, tmp_path):
  """No library is left behind."""
  (tmp_path / 'broken.cu').write_text('no program')
  monkeypatch.setattr(cuda, 'FOLDER', tmp_path)
  monkeypatch.setenv('FPTT_JAX_CACHE_DIR', str(tmp_path / 'cache'))
  with pytest.raises(RuntimeError, match=r'(?s)failed to compile broken\.cu:.*error'):
    cuda.build('broken', 'cpu')
  assert list((tmp_path / 'cache').rglob('*.so')) == []


@pytest.mark.slow
@pytest.mark.parametrize('cell', LAYERS)
def test_compiles_for_a_gpu_without_spills(cell, tmp_path):
  """nvcc compiles for an H100 without register spills, and the library exports the
  expected symbols.
  """
  try:
    command = cuda.compile_command(cell, 'CUDA', 'sm_90')
  except RuntimeError as missing:
    pytest.skip(str(missing))
  library = tmp_path / 'kernels.so'
  done = subprocess.run(
    [*command, '--ptxas-options=-v', '-o', str(library)],
    capture_output=True,
    text=True,
    check=True,
  )
  spills = re.findall(
    r'(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads',
    done.stdout + done.stderr,
  )
  assert spills == 2 * 2 * len(cuda.SIZES) * [
    ('0', '0', '0')
  ]  # Forward and backward, one row a block and two.
  handlers = ctypes.CDLL(str(library))
  assert all(
    hasattr(handlers, f'{cell.lower()}_{direction}')
    for direction in ('forward', 'backward')
  )


def test_the_benchmarks_check_of_kernels(monkeypatch):
  """It accepts the kernels, and refuses one that is wrong by a thousandth."""
  monkeypatch.setattr(gpu_day, 'KERNEL_SIZES', (32,))
  rows = gpu_day.check_kernels()
  assert [(row['layer'], row['H']) for row in rows] == [('LSTM', 32), ('GRU', 32)]
  assert all(row['error'] < 1e-5 for row in rows)
  backward = cuda.run_backward
  monkeypatch.setattr(
    cuda, 'run_backward', lambda *args: [1.001 * leaf for leaf in backward(*args)]
  )
  with pytest.raises(RuntimeError, match=r'largest relative error is 0\.00'):
    gpu_day.check_kernels()
