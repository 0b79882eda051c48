"""Kernels, emulated on the CPU, against the scans they stand in for."""

import ctypes
import functools
import re
import shutil
import subprocess

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import fptt_jax
from fptt_jax import nn
from fptt_jax.nn import kernels

D = 3


@pytest.fixture(scope='module', autouse=True)
def emulated(tmp_path_factory):
  """The kernels compiled for the CPU, in a folder of their own."""
  if jax.default_backend() != 'cpu':
    pytest.skip('emulation needs the CPU to be the default backend')
  if not shutil.which('g++'):
    pytest.skip('emulation needs g++')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    kernels.build('cpu')


def layer(hidden, fused):
  return nn.from_nnx(lambda rngs: nn.LSTM(D, hidden, fused=fused, rngs=rngs))


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def results(hidden, fused, num_steps, batch_size, mask, members=None):
  """All that a window gives out and the gradients of a function of it by weights, initial state and inputs; over members too."""
  run = layer(hidden, fused)
  shape = () if members is None else (members,)

  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  def total(params, state, x):
    end, y = run.apply(params, state, x, mask, None)
    y = y if mask is None else jnp.where(mask[..., None], y, 0)
    return jnp.sum(draw(3, *y.shape) * y) + sum(jnp.sum(jnp.sin(leaf)) for leaf in end), (end, y)

  weights = jax.eval_shape(run.init, jax.random.key(0))
  params = jax.tree.map(lambda leaf: draw(0, *shape, *leaf.shape) / hidden**0.5, weights)
  state = nn.LSTMState(*(draw(seed, *shape, batch_size, hidden) / 2 for seed in (1, 2)))
  x = draw(4, *shape, num_steps, batch_size, D)
  return problems.quick(total if members is None else jax.vmap(total))(params, state, x)


def assert_close(got, expected, tolerance=2e-5):
  """Each leaf to `tolerance` of its largest number. float32 rounds each sum of up to 512 products to some 1e-6, in another order
  here and there, and 20 steps pass that on."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


def ragged(num_steps, batch_size):
  """Holes, a row without a single step, and a last row that is whole."""
  mask = draw(5, num_steps, batch_size) > -0.3
  mask[:, 0], mask[:, -1] = False, True
  return mask


@pytest.mark.parametrize('hidden', kernels.LSTM_SIZES)
@pytest.mark.parametrize(
  ('num_steps', 'batch_size', 'masked'),
  [(20, 2, False), (4, 3, True), (1, 5, False), (7, 5, True)],
  ids=['long', 'masked', 'two rows a block, one step', 'two rows a block, masked'],
)
def test_kernel_equals_both_scans(hidden, num_steps, batch_size, masked):
  """Outputs, final state and all gradients. Up to 4 rows have a block each, more share one by two, the fifth has its own."""
  mask = ragged(num_steps, batch_size) if masked else None
  got = results(hidden, 'kernel', num_steps, batch_size, mask)
  for fused in (True, False):
    assert_close(got, results(hidden, fused, num_steps, batch_size, mask))


def test_a_row_without_steps_keeps_its_state():
  """Bit by bit, and its gradient passes unchanged: cos of the state for a sum of sines, and 0 for its inputs."""
  mask = jnp.array([[False, True, False]] * 4)
  ((_, (end, _)), (_, d_state, dx)) = results(32, 'kernel', 4, 3, mask)
  for leaf, d_leaf, seed in zip(end, d_state, (1, 2), strict=True):
    first = draw(seed, 3, 32) / 2
    np.testing.assert_array_equal(leaf[::2], first[::2])
    np.testing.assert_allclose(d_leaf[::2], np.cos(first[::2]), rtol=1e-6)
  np.testing.assert_array_equal(dx[:, ::2], 0)


def test_members_with_their_own_weights():
  """Under vmap all operands get an axis of members, the mask included, which they share."""
  mask = ragged(4, 3)
  assert_close(results(32, 'kernel', 4, 3, mask, members=3), results(32, True, 4, 3, mask, members=3))


def test_members_of_members():
  """All leading axes are members."""
  run = layer(32, 'kernel')
  params, x = jax.vmap(jax.vmap(run.init))(jax.random.split(jax.random.key(0), (2, 3))), draw(1, 2, 3, 4, 2, D)
  apply = jax.jit(lambda params, x: run.apply(params, run.initial_state(2), x, None, None)[1])
  got = jax.jit(jax.vmap(jax.vmap(apply)))(params, x)
  for i, j in np.ndindex(2, 3):
    assert_close(got[i, j], apply(jax.tree.map(lambda leaf: leaf[i, j], params), x[i, j]))


@functools.cache
def trained(fused, mesh=None):
  """The state after two steps of FPTT, four windows of four steps and one of three each, lengths ragged."""
  run = nn.from_nnx(lambda rngs: nn.Stack(nn.LSTM(D, 32, fused=fused, rngs=rngs), nnx.Linear(32, 1, rngs=rngs)))
  optimizer = fptt_jax.fptt(optax.sgd(0.1, momentum=0.9), alpha=0.5)
  trainer = problems.quick_trainer(run, fptt_jax.losses.terminal_regression(), optimizer, num_windows=5, mesh=mesh)
  batch = problems.regression_batch(19, 6, D)._replace(lengths=np.array([19, 13, 7, 18, 1, 19], np.int32))
  state = trainer.init(jax.random.key(0), batch)
  for _ in range(2):
    state, metrics = trainer.step(state, batch)
  return state.params, state.opt_state, metrics


@pytest.mark.parametrize('devices', [1, 2])
def test_training_equals_the_fused_scan(devices):
  """A train step: a scan over windows within jit, on one device or with the batch split over two."""
  mesh = None if devices == 1 else jax.sharding.Mesh(jax.devices()[:devices], ('batch',))
  assert_close(trained('kernel', mesh), trained(True))


# What is refused.


@pytest.mark.parametrize(
  ('build', 'error', 'message'),
  [
    (lambda rngs: nn.LSTM(D, 32, fused='triton', rngs=rngs), ValueError, "fused must be True, False or 'kernel', got 'triton'."),
    (lambda rngs: nn.GRU(D, 32, fused='kernel', rngs=rngs), ValueError, 'expected a layer that has a kernel, LSTM, got GRU.'),
    (lambda rngs: nn.LRU(D, 32, fused='kernel', rngs=rngs), ValueError, 'expected a layer that has a kernel, LSTM, got LRU.'),
    (
      lambda rngs: nn.LSTM(D, 48, fused='kernel', rngs=rngs),
      ValueError,
      'expected hidden_features to be one of [32, 64, 128], got 48.',
    ),
    (
      lambda rngs: nn.LSTM(D, 32, fused='kernel', param_dtype=jnp.bfloat16, rngs=rngs),
      TypeError,
      "the LSTM's kernel expected float32, got bfloat16.",
    ),
  ],
)
def test_layers_without_a_kernel_are_refused(build, error, message):
  """Where they are built, with what was got and expected."""
  with pytest.raises(error, match=re.escape(message)):
    nn.from_nnx(build)


def test_states_that_do_not_fit_are_refused():
  """A kernel would read beyond them; the layer looks at them, too, and the kernel does not rely on it."""
  run = layer(32, 'kernel')
  params, x = run.init(jax.random.key(0)), draw(1, 4, 3, D)
  with pytest.raises(
    ValueError, match=re.escape('LSTM: state.h must be float32[3, 32], as initial_state gives it, got float32[2, 32].')
  ):
    run.apply(params, run.initial_state(2), x, None, None)
  run_kernel = lambda state: kernels.LSTM_WINDOW.forward((None, params['w_h']), state, jnp.zeros((4, 3, 4 * 32)), None)
  with pytest.raises(ValueError, match=re.escape('expected h of shape (3, 32) and not empty, got (2, 32).')):
    run_kernel(run.initial_state(2))
  halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), run.initial_state(3))
  with pytest.raises(TypeError, match='expected float32, got bfloat16'):
    run_kernel(halves)


def test_other_platforms_are_refused(monkeypatch):
  """On a CPU that is not told to emulate."""
  monkeypatch.setattr(kernels, '_built', set())
  run = layer(32, 'kernel')
  with pytest.raises(RuntimeError, match="fused='kernel' runs on NVIDIA GPUs, got the default backend 'cpu'; fused=True"):
    run.apply(run.init(jax.random.key(0)), run.initial_state(3), draw(1, 4, 3, D), None, None)


def test_a_missing_compiler_is_named(monkeypatch):
  """And where it was looked for."""
  monkeypatch.setenv('PATH', '')
  monkeypatch.delenv('CUDA_HOME', raising=False)
  message = r'the kernels need nvcc to be compiled, and it was not found on the PATH or in \$CUDA_HOME/bin\.'
  with pytest.raises(RuntimeError, match=message):
    kernels.compile_command('CUDA', 'sm_90')
  assert not kernels.available()


def test_what_the_compiler_says_is_told(monkeypatch, tmp_path):
  """If the source does not compile; nothing is left behind."""
  broken = tmp_path / 'broken.cu'
  broken.write_text('no program')
  monkeypatch.setattr(kernels, '_built', set())
  monkeypatch.setattr(kernels, 'SOURCE', broken)
  monkeypatch.setattr(kernels, 'SOURCES', (broken,))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  with pytest.raises(RuntimeError, match=r'(?s)failed to compile broken\.cu:.*error'):
    kernels.build('cpu')
  assert list((tmp_path / 'cache').rglob('*.so')) == []


def test_compiles_for_a_gpu_without_spills(tmp_path):
  """For an H100, by nvcc; all that a step works with stays in registers, and the library has what JAX asks it for."""
  try:
    command = kernels.compile_command('CUDA', 'sm_90')
  except RuntimeError as missing:
    pytest.skip(str(missing))
  library = tmp_path / 'lstm.so'
  done = subprocess.run([*command, '--ptxas-options=-v', '-o', str(library)], capture_output=True, text=True, check=True)
  spills = re.findall(r'(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads', done.stdout + done.stderr)
  assert spills == 2 * 2 * len(kernels.LSTM_SIZES) * [('0', '0', '0')]  # Forward and backward, one row a block and two.
  handlers = ctypes.CDLL(str(library))
  assert all(hasattr(handlers, target) for target in kernels.TARGETS)
