"""The native kernels of the CPU: numbers, fallbacks, and how they are compiled."""

from collections.abc import Callable, Iterator
import concurrent.futures
import functools
import os
from pathlib import Path
import platform
import shutil
import subprocess
import sys
import time
from typing import Any
import warnings

from flax import nnx
import helpers
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import influence, nn
from fptt_jax.nn import _native
from fptt_jax.nn.kernels import cpu

LAYERS = {
  'LSTM': nn.LSTM,
  'GRU': nn.GRU,
  'Elman': nn.ElmanRNN,
  'Antisymmetric': functools.partial(nn.AntisymmetricRNN, epsilon=0.3),
}

TILES = Path(__file__).with_name('emulated_tiles.h')

MACROS_OF_TILES = ('__AVX2__', '__AVX512BF16__', '__AMX_BF16__')
"""Macros of a processor with tile registers."""

TINY = 'extern "C" int answer() { return ANSWER; }'


@pytest.fixture
def kernels() -> None:
  """Skip a test where there is no compiler; a compiler that fails is an error."""
  try:
    cpu.compile_command('lstm', 'float32')
  except RuntimeError as missing:
    pytest.skip(str(missing))
  # The other cells' kernels would warn, which is an error in tests.
  assert cpu.find_problem('lstm', 'float32') is None


@pytest.fixture
def rounding(kernels: None) -> None:
  """Skip a test where the processor has no products of bfloat16."""
  command = cpu.compile_command('lstm', 'bfloat16')
  if '__AVX512BF16__' not in cpu._read_macros(command):
    pytest.skip('the processor has no AVX-512 BF16')


@pytest.fixture
def fresh() -> Iterator[None]:
  """Let a test compile and warn as a new process does."""
  caches = (cpu._register, _native.warn_once)
  for function in caches:
    function.cache_clear()
  yield
  for function in caches:
    function.cache_clear()


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None) -> Path:
  """Put one small source in place of the kernels, and an empty cache."""
  folder = tmp_path / 'source'
  folder.mkdir()
  (folder / 'tiny.h').write_text('#define ANSWER 42\n')
  (folder / 'tiny.cc').write_text(f'#include "tiny.h"\n{TINY}')
  monkeypatch.setattr(cpu, 'FOLDER', folder)
  monkeypatch.setenv('FPTT_JAX_CACHE_DIR', str(tmp_path / 'cache'))
  return folder


def make_model(layer: str, features: int, hidden: int, **options: Any) -> Any:
  return nn.from_nnx(lambda rngs: LAYERS[layer](features, hidden, rngs=rngs, **options))


def draw(seed: int, *shape: int) -> jax.Array:
  # By NumPy, since JAX would compile a program for each shape.
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def draw_mask(*shape: int) -> jax.Array:
  """Return a mask with 60 % valid steps."""
  return jnp.asarray(np.random.default_rng(2).random(shape) < 0.6)


def draw_weights(model: Any, hidden: int) -> Any:
  """Return random weights of a model, about as large as those it starts from."""
  rng = np.random.default_rng(0)
  bound = hidden**-0.5
  return jax.tree.map(
    lambda leaf: rng.uniform(-bound, bound, leaf.shape).astype(np.float32),
    jax.eval_shape(model.init, jax.random.key(0)),
  )


def compute(
  layer: str,
  implementation: str,
  shape: tuple[int, int, int, int],
  masked: bool,
  read: str = 'all',
  **options: Any,
) -> Any:
  """Return a window's results, and gradients of a loss in weights, state and inputs.

  Args:
    layer: name in `LAYERS`.
    implementation: of the layer.
    shape: (S, B, H, D).
    masked: whether 40 % of the steps are masked.
    read: what the loss reads: 'all', 'outputs' or 'end', the state after the window.
    options: further arguments of the layer.
  """
  steps, batch, hidden, features = shape
  options['implementation'] = implementation
  model = make_model(layer, features, hidden, **options)
  dtype = options.get('param_dtype', jnp.float32)
  # The same numbers in any dtype.
  params = draw_weights(make_model(layer, features, hidden), hidden)
  params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  state = jax.tree.map(
    lambda leaf: draw(1, *leaf.shape).astype(dtype) / 2, model.initial_state(batch)
  )
  mask = draw_mask(steps, batch) if masked else None
  weights = draw(3, steps, batch, hidden)

  @helpers.quick
  @lambda function: jax.value_and_grad(function, (0, 1, 2), has_aux=True)
  def total(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    end, y = model.apply(params, state, x, mask, None)
    y = y if mask is None else jnp.where(mask[..., None], y, 0)
    from_end = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(end))
    from_outputs = jnp.sum(weights * y)
    losses = {
      'all': from_end + from_outputs,
      'outputs': from_outputs,
      'end': from_end,
    }
    return losses[read], (end, y)

  (_, results), gradients = total(
    params, state, draw(4, steps, batch, features).astype(dtype)
  )
  return results, gradients


def assert_close(got: Any, expected: Any, tolerance: float = 3e-6) -> None:
  helpers.assert_close(got, expected, tolerance, least=1e-3)


SHAPES = [
  (1, 1, 1, 1),
  (1, 64, 128, 1),
  (3, 3, 5, 2),
  (5, 8, 16, 3),
  (28, 8, 16, 1),
  (4, 50, 17, 50),
  (9, 64, 16, 50),
  (6, 50, 128, 2),
  (2, 3, 600, 70),
]
"""(S, B, H, D)"""


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize(
  ('layer', 'shape', 'masked'),
  # What the cells share, the LSTM alone covers.
  [('LSTM', shape, masked) for shape in SHAPES for masked in (False, True)]
  + [
    (layer, shape, masked)
    for layer in ('GRU', 'Elman', 'Antisymmetric')
    for shape, masked in zip(SHAPES[1::2], (False, True, False, True), strict=True)
  ],
  ids=str,
)
def test_equals_the_scan(layer: str, shape: Any, masked: bool) -> None:
  """Outputs and all gradients are equal for any sizes: rows and units that fill no
  tile, one step, several chunks of a gradient, and weights beyond the cache.
  """
  got = compute(layer, 'native', shape, masked)
  assert_close(got, compute(layer, 'scan', shape, masked))


def distance(tree: Any, other: Any) -> float:
  """Return the largest relative distance of two leaves, as norms."""
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
  return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


@pytest.mark.usefixtures('rounding', 'x64')
@pytest.mark.parametrize('masked', [False, True], ids=['whole', 'masked'])
@pytest.mark.parametrize(
  ('layer', 'shape'),
  [
    *(('LSTM', shape) for shape in [(28, 64, 128, 1), (2, 3, 5, 1), (3, 20, 600, 70)]),
    *((layer, (7, 41, 33, 18)) for layer in LAYERS),
  ],
  ids=str,
)
def test_products_of_bfloat16(layer: str, shape: Any, masked: bool) -> None:
  """Gradients are as far from float64 as rounded operands make them, and nearer to
  those of the fused scan with the same rounding. Without it they are within 1e-6.
  """
  exact = compute(layer, 'scan', shape, masked, param_dtype=jnp.float64)
  assert distance(compute(layer, 'native', shape, masked)[1], exact[1]) < 1e-6
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # The scan says that it is slow.
    scan = compute(layer, 'custom_vjp', shape, masked, products='bfloat16')
  native = compute(layer, 'native', shape, masked, products='bfloat16')
  assert 1e-4 < distance(native[1], exact[1]) < 1e-2
  assert distance(native[1], scan[1]) < 0.5 * distance(native[1], exact[1])


@pytest.fixture
def emulated(
  rounding: None, fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  """Compile the kernels with the emulation of tile registers."""
  compile_command, target = cpu.compile_command, cpu.target

  def command(cell: str, products: str) -> list[str]:
    *before, source = compile_command(cell, products)
    return [*before, '-O1', '-DFPTT_TILES', '-include', str(TILES), source]

  macros = ' '.join(MACROS_OF_TILES)
  monkeypatch.setattr(cpu, 'compile_command', command)
  monkeypatch.setattr(cpu, '_read_macros', lambda command: macros)
  # The processor need not have the registers that are emulated.
  monkeypatch.setattr(cpu, '_request_tiles', lambda: True)
  # A process keeps the kernels that it has registered.
  name = tmp_path.name
  monkeypatch.setattr(cpu, 'target', lambda *args: f'{target(*args)}_{name}')
  monkeypatch.setenv('FPTT_JAX_CACHE_DIR', str(tmp_path))


@pytest.mark.usefixtures('emulated')
@pytest.mark.parametrize(
  ('layer', 'shapes'),
  [
    # Two chunks of a gradient, of which the second is smaller; one row of each kind.
    ('LSTM', [(11, 41, 70, 18), (2, 5, 16, 1)]),
    ('GRU', [(7, 41, 33, 18)]),
    ('Elman', [(3, 17, 16, 1)]),
  ],
)
def test_tiles(layer: str, shapes: list[Any]) -> None:
  """Tiles round as the fused scan does, and what pads them reaches no result.

  Rows, units and features leave a remainder beside whole tiles.
  """
  library = cpu._load(layer.lower(), 'bfloat16')
  for shape in shapes:
    # The kernels reuse the memory of this call, which is full of NaN then.
    model = make_model(layer, 80, 96, implementation='native', products='bfloat16')
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, model.init(jax.random.key(0)))
    jax.block_until_ready(gradients(model, 50)(params, draw(1, 12, 50, 80)))

    before = library.emulated_products()
    exact = compute(layer, 'scan', shape, True)
    native = compute(layer, 'native', shape, True, products='bfloat16')
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # The scan says that it is slow.
      scan = compute(layer, 'custom_vjp', shape, True, products='bfloat16')
    assert 1e-4 < distance(native[1], exact[1]) < 1e-2
    assert distance(native[1], scan[1]) < 0.5 * distance(native[1], exact[1])
    assert library.emulated_products() > before


@pytest.mark.usefixtures('emulated')
def test_threads_do_not_change_a_bit_of_tiles() -> None:
  """Threads share units where the rows fill one tile, and rows where they fill more."""
  for batch in (16, 70):
    assert_threads_do_not_matter('bfloat16', 3, (9, batch, 100, 70))


@pytest.mark.usefixtures('rounding')
@pytest.mark.parametrize(
  ('granted', 'products', 'tiles'),
  [(True, 'bfloat16', True), (False, 'bfloat16', False), (True, 'float32', False)],
)
def test_tiles_are_used_where_the_system_grants_them(
  granted: bool,
  products: str,
  tiles: bool,
  monkeypatch: pytest.MonkeyPatch,
  source: Path,
) -> None:
  """A warning says that products are slow without them."""
  commands = []
  compile_library = cpu._compile

  def compile_and_note(command: list[str], library: Path) -> None:
    commands.append(command)
    compile_library(command, library)

  macros = ' '.join(MACROS_OF_TILES)
  monkeypatch.setattr(cpu, '_read_macros', lambda command: macros)
  monkeypatch.setattr(cpu, '_request_tiles', lambda: granted)
  monkeypatch.setattr(cpu, '_compile', compile_and_note)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    cpu._load('tiny', products)
  assert ['-DFPTT_TILES' in command for command in commands] == [tiles]
  denied = products == 'bfloat16' and not granted
  assert ['tile registers of AMX' in str(one.message) for one in caught] == (
    [True] if denied else []
  )


@pytest.mark.skipif(sys.platform != 'linux', reason='the system has no such call')
def test_a_refused_request_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
  """The answer of the system counts, and a system without the call refuses."""
  calls = []

  class Library:
    answer = 0

    def syscall(self, *arguments: Any) -> int:
      calls.append([argument.value for argument in arguments])
      return self.answer

  monkeypatch.setattr(cpu.ctypes, 'CDLL', lambda name: Library())
  assert cpu._request_tiles()
  assert calls == [[158, 0x1023, 18]]
  Library.answer = -1
  assert not cpu._request_tiles()
  monkeypatch.setattr(cpu.ctypes, 'CDLL', lambda name: object())
  assert not cpu._request_tiles()


@pytest.mark.usefixtures('kernels')
@pytest.mark.skipif(platform.machine() != 'x86_64', reason='tiles are of x86-64')
@pytest.mark.parametrize('compiler', cpu.COMPILERS)
def test_compilers_accept_tiles(compiler: str) -> None:
  """On any x86-64 processor."""
  if shutil.which(compiler) is None:
    pytest.skip(f'there is no {compiler}')
  command = cpu.compile_command('gru', 'bfloat16')
  options = [option for option in command[1:] if option != '-march=native']
  tiles = ['-march=sapphirerapids', '-DFPTT_TILES', '-fsyntax-only', '-Werror']
  subprocess.run([compiler, *options, *tiles], check=True)


@pytest.mark.usefixtures('rounding')
def test_products_follow_the_precision_of_jax() -> None:
  """`jax.default_matmul_precision` decides where the layer does not."""
  shape = (5, 9, 33, 5)
  rounded = compute('LSTM', 'native', shape, False, products='bfloat16')
  with jax.default_matmul_precision('bfloat16'):
    followed = compute('LSTM', 'native', shape, False)
    exact = compute('LSTM', 'native', shape, False, products='float32')
  jax.tree.map(np.testing.assert_array_equal, followed, rounded)
  expected = compute('LSTM', 'native', shape, False)
  jax.tree.map(np.testing.assert_array_equal, exact, expected)


@pytest.mark.usefixtures('kernels')
def test_exported_programs_have_the_products_of_the_layer() -> None:
  """They cannot hold the kernel, and products of float32 stay exact in them."""
  layer = nn.LSTM(8, 24, products='float32', rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 8)), jnp.float32)

  def run(x: jax.Array) -> jax.Array:
    return layer(layer.initial_state(3), x)[1]

  expected = run(x)
  with jax.default_matmul_precision('bfloat16'):
    exported = export.export(jax.jit(run), platforms=['cpu'])(x)
  np.testing.assert_allclose(exported.call(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('macros', 'expected'),
  [('__AVX2__', 'no products of bfloat16'), ('__SSE4_2__', 'neither AVX2 nor')],
)
@pytest.mark.usefixtures('kernels')
def test_a_processor_without_products_of_bfloat16(
  macros: str, expected: str, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The scan rounds in their place, and says once that this is slow."""
  monkeypatch.setattr(cpu, '_read_macros', lambda command: macros)
  with pytest.warns(UserWarning, match=f"'bfloat16' is slower .* {expected}"):
    got = compute('LSTM', 'auto', (3, 4, 5, 6), False, products='bfloat16')
  exact = compute('LSTM', 'scan', (3, 4, 5, 6), False)
  assert 1e-4 < distance(got[1], exact[1]) < 1e-2


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda rngs: nn.LSTM(2, 3, products='int8', rngs=rngs), r"products .*'int8'"),
    (
      lambda rngs: nn.LSTM(2, 3, products='bfloat16', implementation='scan', rngs=rngs),
      r"products .*LSTM with 'scan', got 'bfloat16'",
    ),
    (
      lambda rngs: nn.LSTM(
        2, 3, products='bfloat16', param_dtype=jnp.float16, rngs=rngs
      ),
      r"param_dtype .*products='bfloat16', got float16",
    ),
  ],
  ids=['unknown', 'scan', 'dtype'],
)
def test_products_that_a_layer_refuses(build: Any, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    build(nnx.Rngs(0))


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('read', ['outputs', 'end'])
@pytest.mark.parametrize('layer', LAYERS)
def test_outputs_that_no_loss_reads(layer: str, read: str) -> None:
  """The kernel takes an absent gradient of y, and of the end state, as zeros."""
  shape = (5, 7, 20, 3)
  got = compute(layer, 'native', shape, True, read)
  assert_close(got, compute(layer, 'scan', shape, True, read))


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('threads', [2, 5])
@pytest.mark.parametrize('shape', [(9, 70, 100, 70), (3, 5, 600, 40)], ids=str)
@pytest.mark.parametrize('products', ['float32', 'bfloat16'])
def test_threads_do_not_change_a_bit(
  products: str, threads: int, shape: Any, request: pytest.FixtureRequest
) -> None:
  """Threads that share rows, or units, give the bits of a single one."""
  if products == 'bfloat16':
    request.getfixturevalue('rounding')
  assert_threads_do_not_matter(products, threads, shape)


def assert_threads_do_not_matter(products: str, threads: int, shape: Any) -> None:
  library = cpu._load('lstm', products)
  found = []
  try:
    for limit in (1, threads):
      library.set_thread_limit(limit)
      results = compute('LSTM', 'native', shape, True, products=products)
      # The limit must not change before the threads are done.
      found.append(jax.block_until_ready(results))
  finally:
    library.set_thread_limit(cpu.count_threads())
  jax.tree.map(np.testing.assert_array_equal, *found)


def gradients(model: Any, batch_size: int) -> Callable[..., Any]:
  """Return the gradient of a loss of (params, x) in params."""

  def total(params: Any, x: jax.Array) -> jax.Array:
    state = model.initial_state(batch_size)
    return jnp.sum(jnp.sin(model.apply(params, state, x, None, None)[1]))

  return jax.grad(total)


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('layer', LAYERS)
def test_members(layer: str) -> None:
  """Models under vmap run in one call, with data that they share and data of their
  own, also two deep.
  """
  models = [make_model(layer, 2, 9, implementation=i) for i in ('native', 'scan')]
  keys = jax.random.split(jax.random.key(0), 6).reshape(2, 3)
  params = jax.vmap(jax.vmap(models[0].init))(keys)
  x = draw(1, 3, 5, 4, 2)

  def run(model: Any) -> Any:
    inner = jax.vmap(gradients(model, 4))
    return helpers.quick(jax.vmap(inner, in_axes=(0, None)))(params, x)

  assert_close(run(models[0]), run(models[1]))


@pytest.mark.usefixtures('kernels')
def test_without_jit() -> None:
  """The operation runs eagerly, and where compilation is off."""
  model = make_model('LSTM', 2, 5, implementation='native')
  params, x = model.init(jax.random.key(0)), draw(1, 3, 4, 2)
  expected = jax.jit(gradients(model, 4))(params, x)
  assert_close(gradients(model, 4)(params, x), expected)
  with jax.disable_jit():
    assert_close(gradients(model, 4)(params, x), expected)


@pytest.mark.usefixtures('kernels')
def test_nonfinite_numbers_come_through() -> None:
  """A weight that is not a number shows in the outputs and the gradient."""
  model = make_model('LSTM', 2, 5, implementation='native')
  params = jax.tree.map(lambda w: w.at[0].set(jnp.nan), model.init(jax.random.key(0)))
  x = draw(1, 3, 4, 2)
  y = model.apply(params, model.initial_state(4), x, None, None)[1]
  assert np.isnan(y).any()
  assert all(np.isnan(d).any() for d in jax.tree.leaves(gradients(model, 4)(params, x)))


@pytest.mark.usefixtures('kernels')
def test_weights_of_another_shape_never_reach_the_kernel() -> None:
  """JAX refuses them, as without the kernel."""
  model = make_model('LSTM', 2, 5)
  params = dict(model.init(jax.random.key(0)))
  params['w_h'] = params['w_h'][:-1]
  with pytest.raises(ValueError, match='Size of label'):
    model.apply(params, model.initial_state(4), draw(1, 3, 4, 2), None, None)


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('platforms', [('cpu',), ('cpu', 'cuda')], ids=str)
def test_exported_programs_hold_no_kernel(platforms: tuple[str, ...]) -> None:
  """Another process, or device, can run them: forward, backward and under vmap."""
  model = make_model('LSTM', 2, 5)
  params = jax.vmap(model.init)(jax.random.split(jax.random.key(0), 2))
  run = helpers.quick(jax.vmap(gradients(model, 4), in_axes=(0, None)))
  x = draw(1, 3, 4, 2)
  assert 'fptt_jax_cpu_lstm_float32_backward' in run.lower(params, x).as_text()
  exported = export.export(run, platforms=platforms)(params, x)
  assert 'fptt_jax_cpu' not in exported.mlir_module()
  restored = export.deserialize(exported.serialize())
  assert_close(restored.call(params, x), run(params, x))


@functools.cache
def train(implementation: str, mesh: jax.sharding.Mesh | None = None) -> Any:
  """Train a stack of two layers for two steps on ragged sequences."""

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    return nn.Sequential(
      nn.LSTM(3, 20, implementation=implementation, rngs=rngs),
      nn.LSTM(20, 10, implementation=implementation, rngs=rngs),
      nnx.Linear(10, 4, rngs=rngs),
    )

  loss = fptt_jax.losses.terminal_classification(4)
  trainer = fptt_jax.make_trainer(
    nn.from_nnx(build), loss, fptt_jax.fptt(optax.sgd(0.5)), num_windows=3, mesh=mesh
  )
  lengths = jnp.array([11, 3, 8, 11, 1, 7, 11, 5])
  batch = fptt_jax.Batch(draw(1, 11, 8, 3), jnp.arange(8) % 4, lengths)
  state = trainer.init(jax.random.key(0), batch)
  for _ in range(2):
    state, metrics = trainer.step(state, batch)
  return state.params, metrics.loss


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('devices', [1, 2])
def test_train_steps(devices: int) -> None:
  """Training equals that with the plain scan, on one device and split over two."""
  mesh = None
  if devices > 1:
    mesh = jax.sharding.Mesh(jax.devices('cpu')[:devices], ('batch',))
  assert_close(train('native', mesh), train('scan'), 2e-5)


def own_window(
  layer: str, shape: tuple[int, int, int, int], masked: bool, **options: Any
) -> tuple[Any, ...]:
  """Return arguments of `Influence.advance` and `credit`, with a random influence.

  Args:
    layer: name in `LAYERS` but 'Antisymmetric'.
    shape: (S, B, H, D).
    masked: whether 40 % of the steps are masked.
    options: further arguments of the layer.

  Returns:
    (window, params, hidden, influence {path: [B, ..., m, k H]}).
  """
  steps, batch, hidden, features = shape
  model = make_model(layer, features, hidden, **options)
  params = draw_weights(model, hidden)
  state = jax.tree.map(
    lambda leaf: draw(1, *leaf.shape) / 2, model.initial_state(batch)
  )
  mask = draw_mask(steps, batch)

  def run(params: Any, hidden: Any, x: Any, mask: Any) -> Any:
    return model.plain(params, hidden, x, mask, None)[0]

  window = influence.WindowMap(
    run,
    draw(4, steps, batch, features),
    mask if masked else None,
    own_steps=model.own_steps,
    own_kernels=model.own_kernels,
  )
  zeros = influence.snap1().init(window, params, state)
  leaves, structure = jax.tree.flatten(zeros)
  drawn = [draw(5 + number, *leaf.shape) for number, leaf in enumerate(leaves)]
  return window, params, state, jax.tree.unflatten(structure, drawn)


def advance_and_credit(method: Any, *window: Any) -> tuple[Any, Any]:
  """Return the influence after a window, and the credit of a random gradient."""
  delta = jax.tree.map(lambda leaf: draw(9, *leaf.shape), window[2])
  return method.advance(*window, None), method.credit(*window, delta)


def program_of(function: Any, *args: Any) -> str:
  return str(jax.jit(function).lower(*args).as_text())


OWN_SHAPES = [
  (1, 1, 1, 1),
  (16, 9, 64, 1),
  (5, 40, 21, 6),
  (28, 2, 300, 3),
]
"""(S, B, H, D): one step, whole vectors, parts of vectors, a window that is cut."""


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize(
  ('layer', 'shape', 'masked'),
  # What the cells share, the LSTM alone covers.
  [('LSTM', shape, masked) for shape in OWN_SHAPES for masked in (False, True)]
  + [(layer, shape, True) for layer in ('GRU', 'Elman') for shape in OWN_SHAPES[::2]],
  ids=str,
)
def test_influence_equals_that_of_steps(layer: str, shape: Any, masked: bool) -> None:
  """Influence and credit are those that plain JAX computes."""
  window, *others = own_window(layer, shape, masked)
  for own_only in (False, True):
    method = influence.snap1(own_only)
    run = functools.partial(advance_and_credit, method)
    got = helpers.quick(functools.partial(run, window))(*others)
    plain = window._replace(own_kernels=None)
    assert_close(got, helpers.quick(functools.partial(run, plain))(*others))


@pytest.mark.usefixtures('kernels')
def test_what_has_no_kernel_keeps_its_influence_right() -> None:
  """A GRU without its second bias has a kernel; a scan has none."""
  shape = (5, 4, 7, 3)
  window, *others = own_window('GRU', shape, True, recurrent_bias=False)
  method = influence.snap1()
  run = functools.partial(advance_and_credit, method)
  got = helpers.quick(functools.partial(run, window))(*others)
  plain = window._replace(own_kernels=None)
  assert_close(got, helpers.quick(functools.partial(run, plain))(*others))
  for implementation, expected in (('auto', True), ('scan', False)):
    window, *others = own_window('LSTM', shape, True, implementation=implementation)
    advance = functools.partial(method.advance, window)
    text = program_of(advance, *others, None)
    assert ('fptt_jax_cpu_own_float32_lstm' in text) == expected


def test_influence_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
  """Plain JAX advances it."""
  monkeypatch.setattr(cpu, 'find_problem', lambda *names: 'there is no compiler')
  window, *others = own_window('LSTM', (5, 40, 21, 6), False)
  run = functools.partial(advance_and_credit, influence.snap1(), window)
  assert 'fptt_jax_cpu' not in program_of(run, *others)


@pytest.mark.usefixtures('rounding')
def test_influence_with_products_of_bfloat16() -> None:
  """Only the window itself rounds."""
  window, *others = own_window('LSTM', (5, 4, 20, 3), True, products='bfloat16')
  advance = influence.snap1().advance
  got = advance(window, *others, None)
  exact = advance(window._replace(own_kernels=None), *others, None)
  assert 1e-5 < distance(got, exact) < 1e-2


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize(
  'shape', [(20, 2, 100, 5), (20, 40, 100, 5), (28, 2, 300, 3)], ids=str
)
def test_threads_do_not_change_an_influence(shape: tuple[int, ...]) -> None:
  """Threads share rows or units; a window of many units is cut into parts."""
  library = cpu._load('own', 'float32')
  window = own_window('LSTM', shape, True)
  found = []
  try:
    for limit in (1, 3):
      library.set_thread_limit(limit)
      results = advance_and_credit(influence.snap1(), *window)
      # The limit must not change before the threads are done.
      found.append(jax.block_until_ready(results))
  finally:
    library.set_thread_limit(cpu.count_threads())
  jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.usefixtures('kernels')
def test_a_million_rows_of_influence() -> None:
  """More parts than the threads can number at once."""
  rows = 2**20 + 5
  window, params, state, moved = own_window('Elman', (1, rows, 1, 1), False)
  got = influence.snap1().advance(window, params, state, moved, None)
  few = lambda tree: jax.tree.map(lambda leaf: leaf[-9:], tree)
  part = window._replace(x=window.x[:, -9:], own_kernels=None)
  expected = influence.snap1().advance(part, params, few(state), few(moved), None)
  assert_close(few(got), expected)


@pytest.mark.usefixtures('kernels')
def test_influences_of_members() -> None:
  """Models under vmap run in one call."""
  window, params, hidden, state = own_window('LSTM', (5, 20, 9, 2), True)
  members = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), (params, state))

  def run(member: tuple[Any, Any]) -> tuple[Any, Any]:
    params, state = member
    return advance_and_credit(influence.snap1(), window, params, hidden, state)

  found = helpers.quick(jax.vmap(run))(members)
  for number in range(2):
    one = jax.tree.map(lambda leaf, number=number: leaf[number], (members, found))
    assert_close(one[1], run(one[0]))


@pytest.mark.usefixtures('kernels')
def test_exported_influences_hold_no_kernel() -> None:
  """Another process can run them, also under vmap."""
  window, params, hidden, state = own_window('LSTM', (5, 20, 9, 2), True)
  run = jax.jit(
    lambda state: advance_and_credit(influence.snap1(), window, params, hidden, state)
  )
  several = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), state)
  for function, given in ((run, state), (jax.jit(jax.vmap(run)), several)):
    assert 'fptt_jax_cpu_own_float32_lstm' in program_of(function, given)
    exported = export.export(function)(given)
    assert 'fptt_jax_cpu' not in exported.mlir_module()
    restored = export.deserialize(exported.serialize())
    assert_close(restored.call(given), function(given))


@functools.cache
def train_with_influence(implementation: str) -> tuple[Any, Any]:
  """Train a stack of two layers for two steps on ragged sequences with SnAp-1."""

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    return nn.Sequential(
      nn.LSTM(3, 20, implementation=implementation, rngs=rngs),
      nnx.Linear(20, 5, rngs=rngs),
      nn.GRU(5, 10, implementation=implementation, rngs=rngs),
      nnx.Linear(10, 4, rngs=rngs),
    )

  loss = fptt_jax.losses.terminal_classification(4)
  trainer = fptt_jax.make_trainer(
    nn.from_nnx(build),
    loss,
    fptt_jax.fptt(optax.sgd(0.5)),
    num_windows=3,
    influence='snap1',
    carry_hidden=True,
  )
  lengths = jnp.array([11, 3, 8, 11, 1, 7, 11, 5])
  batch = fptt_jax.Batch(draw(1, 11, 8, 3), jnp.arange(8) % 4, lengths)
  state = trainer.init(jax.random.key(0), batch)
  for _ in range(2):
    state, metrics = trainer.step(state, batch)
  return (state.params, state.influence), metrics.credit_norm


@pytest.mark.usefixtures('kernels')
def test_train_steps_with_influence() -> None:
  """Training with SnAp-1 equals that with the plain scan."""
  assert_close(train_with_influence('native'), train_with_influence('scan'), 2e-5)


@pytest.mark.usefixtures('kernels')
def test_an_influence_is_overwritten() -> None:
  """A step needs no second influence, and runs each window forward once."""
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(nn.LSTM(1, 64, rngs=rngs), nnx.Linear(64, 1, rngs=rngs))
  )
  loss = fptt_jax.losses.terminal_regression()
  trainer = fptt_jax.make_trainer(
    model, loss, optax.sgd(0.1), method='tbptt', num_windows=4, influence='snap1'
  )
  batch = fptt_jax.Batch(draw(1, 16, 32, 1), draw(2, 32))
  state = trainer.init(jax.random.key(0), batch)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.influence))
  step = jax.jit(trainer.step, donate_argnums=0)
  compiled = helpers.optimized(step.lower(state, batch))
  assert compiled.as_text().count('lstm_float32_forward"') == 1
  # The state of the scan is one.
  assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * size


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize(
  ('implementation', 'steps', 'batch', 'expected'),
  [
    ('auto', 1, 1, False),
    ('native', 1, 1, True),
    ('auto', 1, 2, True),
    ('auto', 2, 1, True),
  ],
)
def test_a_single_row_runs_without_the_kernel(
  implementation: str, steps: int, batch: int, expected: bool
) -> None:
  """'auto' takes what is faster."""
  model = make_model('LSTM', 2, 5, implementation=implementation)
  x = jax.ShapeDtypeStruct((steps, batch, 2), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0))
  apply = functools.partial(model.apply, mask=None, key=None)
  jaxpr = jax.make_jaxpr(lambda p, x: apply(p, model.initial_state(batch), x))(
    params, x
  )
  assert ('fptt_jax_native_forward' in str(jaxpr)) == expected


@pytest.mark.usefixtures('kernels')
def test_memory_of_a_window() -> None:
  """A window keeps six numbers a unit and step: four gates, the memory, the output."""
  model = make_model('LSTM', 1, 128, implementation='native')

  def temporary_bytes(steps: int) -> int:
    x = jax.ShapeDtypeStruct((steps, 64, 1), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    lowered = jax.jit(gradients(model, 64)).lower(params, x)
    return helpers.optimized(lowered).memory_analysis().temp_size_in_bytes

  grown = temporary_bytes(64) - temporary_bytes(32)
  # The loss of `gradients` reads y and makes its gradient, another two.
  assert grown / (32 * 64 * 128 * 4) <= 8.05


@pytest.mark.parametrize(
  ('options', 'expected'),
  [({'param_dtype': jnp.bfloat16}, 'takes float32, got bfloat16')],
)
def test_what_the_kernel_cannot_run_is_said_once(
  fresh: None, options: dict[str, Any], expected: str
) -> None:
  """'native' warns once; 'auto' says nothing. Both give the numbers of the scan."""
  x, found = draw(1, 3, 4, 2), {}
  with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    for implementation in ('custom_vjp', 'auto', 'native', 'native'):
      model = make_model('LSTM', 2, 5, implementation=implementation, **options)
      params = model.init(jax.random.key(0))
      state = model.initial_state(4)
      found[implementation] = model.apply(params, state, x, None, None)[1]
  assert [str(warning.message) for warning in seen if expected in str(warning.message)]
  assert len(seen) == 1
  np.testing.assert_array_equal(found['auto'], found['custom_vjp'])
  np.testing.assert_array_equal(found['native'], found['custom_vjp'])


def break_compiler(folder: Path) -> None:
  """Make a compiler that fails."""
  for name in cpu.COMPILERS:
    path = folder / name
    path.write_text('#!/bin/sh\necho "no such luck" >&2\nexit 1\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
  ('broken', 'expected'),
  [(False, r'need g\+\+ or clang\+\+ on the PATH'), (True, 'no such luck')],
  ids=['absent', 'broken'],
)
def test_without_a_working_compiler(
  broken: bool,
  expected: str,
  fresh: None,
  monkeypatch: pytest.MonkeyPatch,
  tmp_path: Path,
) -> None:
  """'auto' runs the fused scan in silence; 'native' says once what is missing."""
  if broken:
    break_compiler(tmp_path)
  monkeypatch.setenv('PATH', f'{tmp_path}:/bin' if broken else str(tmp_path))
  monkeypatch.setenv('FPTT_JAX_CACHE_DIR', str(tmp_path / 'cache'))
  x = draw(1, 3, 4, 2)

  def outputs(implementation: str) -> Any:
    model = make_model('LSTM', 2, 5, implementation=implementation)
    params = model.init(jax.random.key(0))
    return model.apply(params, model.initial_state(4), x, None, None)[1]

  expected_outputs = outputs('custom_vjp')
  np.testing.assert_array_equal(outputs('auto'), expected_outputs)
  with pytest.warns(UserWarning, match=expected):
    np.testing.assert_array_equal(outputs('native'), expected_outputs)
  outputs('native')  # A second warning would be an error.


@pytest.mark.usefixtures('kernels')
def test_a_library_is_compiled_once(source: Path, tmp_path: Path) -> None:
  """It is kept, and made anew when the source or a header changes."""
  cache = tmp_path / 'cache'
  assert cpu._load('tiny', 'float32').answer() == 42
  [first] = cache.iterdir()
  stamp = first.stat().st_mtime_ns
  assert cpu._load('tiny', 'float32').answer() == 42
  assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [stamp]
  (source / 'tiny.h').write_text('#define ANSWER 43\n')
  assert cpu._load('tiny', 'float32').answer() == 43
  (source / 'tiny.cc').write_text(f'#define ANSWER 44\n{TINY}')
  assert cpu._load('tiny', 'float32').answer() == 44
  assert len(list(cache.iterdir())) == 3
  assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures('kernels')
def test_what_a_library_depends_on(
  source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The interface, the instructions of the processor and the options name it; where the
  compiler and the headers lie does not.
  """

  def digest(command: list[str]) -> str:
    return cpu._digest(command, cpu._read_macros(command))

  command = cpu.compile_command('tiny', 'float32')
  narrow = [option.replace('native', 'x86-64') for option in command]
  debug = [command[0], '-g', *command[1:]]
  digests = {digest(command), digest(narrow), digest(debug)}
  place = command.index('-isystem') + 1
  moved = ['/elsewhere/' + Path(command[0]).name, *command[1:]]
  moved[place] = '/elsewhere/include'
  assert cpu._digest(moved, cpu._read_macros(command)) == digest(command)
  monkeypatch.setattr(cpu, 'version', lambda package: '0.0.1')
  assert len(digests | {digest(command)}) == 4


@pytest.mark.usefixtures('kernels')
def test_processes_compile_at_once(source: Path, tmp_path: Path) -> None:
  """Each of two gets a whole library, and one is left behind."""
  program = (
    'from pathlib import Path; from fptt_jax.nn.kernels import cpu; '
    f'cpu.FOLDER = Path({str(source)!r}); print(cpu._load("tiny", "float32").answer())'
  )
  command = [sys.executable, '-c', program]
  processes = [
    subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)
  ]
  assert [process.communicate()[0] for process in processes] == ['42\n', '42\n']
  assert len(list((tmp_path / 'cache').iterdir())) == 1


@pytest.mark.usefixtures('kernels')
def test_a_folder_that_others_may_write_is_not_used(
  source: Path, tmp_path: Path
) -> None:
  """Nothing is read from it or written to it."""
  cache = tmp_path / 'cache'
  cache.mkdir()
  cache.chmod(0o777)
  assert cpu._load('tiny', 'float32').answer() == 42
  assert list(cache.iterdir()) == []


@pytest.mark.usefixtures('kernels')
def test_a_folder_of_another_user_is_not_used(
  source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Nothing is read from it or written to it."""
  user = os.getuid()
  (tmp_path / 'cache').mkdir()
  monkeypatch.setattr(os, 'getuid', lambda: user + 1)
  assert cpu._load('tiny', 'float32').answer() == 42
  assert list((tmp_path / 'cache').iterdir()) == []


@pytest.mark.usefixtures('kernels')
def test_a_library_that_others_may_write_is_replaced(
  source: Path, tmp_path: Path
) -> None:
  """Whoever could write it could run code in this process."""
  command = cpu.compile_command('tiny', 'float32')
  library = (
    tmp_path / 'cache' / f'tiny-{cpu._digest(command, cpu._read_macros(command))}.so'
  )
  library.parent.mkdir(mode=0o700)
  library.write_text('not a library')
  library.chmod(0o666)
  assert cpu._load('tiny', 'float32').answer() == 42
  assert library.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('kind', ['read-only', 'not a folder'])
def test_a_folder_that_cannot_be_written(
  kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The process compiles for itself, and leaves nothing behind."""
  cache = tmp_path / 'cache'
  if kind == 'read-only':
    cache.mkdir()
    access = os.access  # It tells root that all can be written.
    may = lambda path, mode: mode != os.W_OK and access(path, mode)
    monkeypatch.setattr(os, 'access', may)
  else:
    cache.write_text('')
  monkeypatch.setenv('TMPDIR', str(tmp_path / 'temporary'))
  (tmp_path / 'temporary').mkdir()
  monkeypatch.setattr('tempfile.tempdir', None)
  assert cpu._load('tiny', 'float32').answer() == 42
  assert not list((tmp_path / 'temporary').iterdir())
  assert not cache.is_dir() or not list(cache.iterdir())


@pytest.mark.usefixtures('kernels')
def test_a_damaged_library_is_compiled_anew(source: Path, tmp_path: Path) -> None:
  """An empty file, as an interrupted copy leaves it."""
  command = cpu.compile_command('tiny', 'float32')
  digest = cpu._digest(command, cpu._read_macros(command))
  library = tmp_path / 'cache' / f'tiny-{digest}.so'
  library.parent.mkdir(mode=0o700)
  library.touch(0o700)
  assert cpu._load('tiny', 'float32').answer() == 42
  assert library.stat().st_size > 0


@pytest.mark.usefixtures('kernels')
def test_a_full_disk_of_the_cache(
  source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The process compiles for itself."""
  compile_library = cpu._compile

  def compile_elsewhere(command: list[str], library: Path) -> None:
    if library.is_relative_to(tmp_path / 'cache'):
      raise OSError('No space left on device')
    compile_library(command, library)

  monkeypatch.setattr(cpu, '_compile', compile_elsewhere)
  assert cpu._load('tiny', 'float32').answer() == 42
  assert list((tmp_path / 'cache').iterdir()) == []


@pytest.mark.usefixtures('kernels', 'fresh')
def test_threads_of_python_meet_at_the_first_use(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """One of them registers the kernels, since JAX takes each name once."""
  library = cpu._load('elman', 'float32')
  loaded = []

  def load(cell: str, products: str) -> Any:
    time.sleep(0.2)
    loaded.append(cell)
    return library

  monkeypatch.setattr(cpu, '_load', load)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = [pool.submit(cpu.find_problem, 'elman', 'float32') for _ in range(4)]
  assert [one.result() for one in found] == [None] * 4
  assert loaded == ['elman']


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('where', ['caller', 'helper'])
def test_a_part_without_memory_ends_the_call_alone(where: str, tmp_path: Path) -> None:
  """Not the process, and not before the other threads have left its memory."""
  threads = Path(__file__).with_name('threads')
  compiler = cpu.compile_command('lstm', 'float32')[0]
  program = tmp_path / 'program'
  headers = ['-I', str(threads), '-I', str(cpu.FOLDER)]
  options = ['-std=c++17', '-O1', '-march=native', '-pthread', *headers]
  source = str(threads / 'without_memory.cc')
  subprocess.run([compiler, *options, source, '-o', str(program)], check=True)
  command = [str(program), *(['here'] if where == 'caller' else [])]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout == '1 1\n'


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('layer', ['LSTM', 'GRU', 'Elman'])
def test_an_infinite_input_harms_no_more_than_it_must(layer: str) -> None:
  """With units that fill no vector, the unused lanes have weights of 0."""
  x = jnp.ones((3, 4, 1)).at[0, 0, 0].set(jnp.inf)
  found = []
  for implementation in ('custom_vjp', 'native'):
    model = make_model(layer, 1, 5, implementation=implementation)
    params, state = model.init(jax.random.key(0)), model.initial_state(4)

    def total(params: Any, state: Any, model: Any = model) -> jax.Array:
      return model.apply(params, state, x, None, None)[1].sum()

    gradients = jax.grad(total, (0, 1))(params, state)
    found.append(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), gradients))
  assert found[0] == found[1]


@pytest.mark.parametrize('layer', [nn.GRU, nn.LSTM, nn.IndRNN, nn.LRU])
@pytest.mark.parametrize('split', ['rows', 'mask'])
def test_gradients_within_a_shard_map_that_checks_types(layer: Any, split: str) -> None:
  """They are added up over devices as those of the plain scan, also where the mask
  alone varies.
  """
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('batch',))
  spec = jax.sharding.PartitionSpec
  x = draw(1, 3, 4, 2) if split == 'rows' else draw(1, 3, 2, 2)
  mask = jnp.asarray(np.random.default_rng(0).random((3, 4)) < 0.6)
  found = []
  for implementation in ('scan', 'auto'):
    model = nn.from_nnx(
      lambda rngs, implementation=implementation: layer(
        2, 5, implementation=implementation, rngs=rngs
      )
    )

    def total(params: Any, x: jax.Array, mask: jax.Array, model: Any = model) -> Any:
      # The state must vary over devices as what it is computed from does.
      zero = 0 * x[0, :, :1] * mask[0, :, None]
      state = jax.tree.map(lambda leaf: leaf + zero, model.initial_state(2))
      outputs = model.apply(params, state, x, mask, None)[1]
      kept = jnp.where(mask[..., None], jnp.sin(outputs), 0)
      return jax.lax.psum(kept.sum(), 'batch')

    rows = spec(None, 'batch') if split == 'rows' else spec()
    specs = (spec(), rows, spec(None, 'batch'))
    over_devices = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=spec())
    params = model.init(jax.random.key(0))
    found.append(jax.jit(jax.grad(over_devices))(params, x, mask))
  assert_close(*found)


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
  """It is that of the processors at hand, unless the environment says otherwise."""
  monkeypatch.delenv('FPTT_JAX_NUM_THREADS', raising=False)
  assert 1 <= cpu.count_threads() <= (os.cpu_count() or 1)
  monkeypatch.setenv('FPTT_JAX_NUM_THREADS', '3')
  assert cpu.count_threads() == 3
  for wrong in ('0', '-1', 'two'):
    monkeypatch.setenv('FPTT_JAX_NUM_THREADS', wrong)
    with pytest.raises(ValueError, match=f"FPTT_JAX_NUM_THREADS .* got '{wrong}'"):
      cpu.count_threads()


def test_layers_without_a_kernel_refuse_it() -> None:
  """The error names the layer and what it takes."""
  with pytest.raises(ValueError, match=r"implementation .*IndRNN.* got 'native'"):
    nn.IndRNN(2, 3, implementation='native', rngs=nnx.Rngs(0))
