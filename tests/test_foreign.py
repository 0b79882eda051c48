"""Models from Equinox, Haiku and user modules, and trained parameters put back into
modules.
"""

import inspect
import subprocess
import sys
from typing import Any

from flax import linen, nnx
from helpers import quick_trainer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import nn

T, B, D, H = 6, 3, 2, 4
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(T, B, D)).astype(np.float32)


def in_two_windows(
  model: fptt_jax.Model, params: Any, x: Any = X, key: Any = None
) -> jax.Array:
  """Returns the outputs [T, B, ...] of two windows with the state carried."""
  run = jax.jit(lambda state, x: model.apply(params, state, x, None, key))
  state, first = run(model.initial_state(B), x[:3])
  _, second = run(state, x[3:])
  return jnp.concatenate([first, second])


def trained(model: fptt_jax.Model) -> Any:
  """Returns parameters after one sequence of training."""
  loss = fptt_jax.losses.terminal_regression()
  trainer = fptt_jax.make_trainer(
    model, loss, fptt_jax.fptt(optax.adam(1e-2)), num_windows=2
  )
  batch = fptt_jax.Batch(X, np.ones((B, H), np.float32), np.array([T, 4, 1]))
  state, metrics = trainer.step(trainer.init(KEY, batch), batch)
  assert np.isfinite(metrics.loss).all()
  return state.params


# Equinox.


@pytest.fixture(name='eqx')
def equinox() -> Any:
  return pytest.importorskip(
    'equinox', reason='Equinox is not installed for this version of JAX.'
  )


@pytest.mark.parametrize('name', ['GRUCell', 'LSTMCell'])
def test_equinox_cells(eqx: Any, name: str) -> None:
  """Windows equal the cell called row by row and step by step, before and after
  training.
  """

  def build(key):
    return getattr(eqx.nn, name)(D, H, key=key)

  model = nn.from_equinox(build)
  for params in (model.init(KEY), trained(model)):
    cell = eqx.combine(params, build(jax.random.key(5)))
    run = jax.jit(lambda x, state, cell=cell: cell(x, state))
    y = in_two_windows(model, params)
    for row in range(B):
      state = jnp.zeros(H) if name == 'GRUCell' else (jnp.zeros(H), jnp.zeros(H))
      for step in range(T):
        state = run(X[step, row], state)
        expected = state if name == 'GRUCell' else state[0]
        np.testing.assert_allclose(y[step, row], expected, atol=1e-6)


def test_equinox_module_of_ones_own(eqx: Any) -> None:
  """A module may have several cells, a readout, dropout, integer constants and static
  fields.
  """

  class Tagger(eqx.Module):
    cells: list[Any]
    readout: Any
    dropout: Any
    order: jax.Array
    scale: float

    def __init__(self, key: jax.Array):
      first, second, third = jax.random.split(key, 3)
      self.cells = [eqx.nn.GRUCell(D, H, key=first), eqx.nn.GRUCell(H, H, key=second)]
      self.readout = eqx.nn.Linear(H, H, key=third)
      self.dropout = eqx.nn.Dropout(0.5)
      self.order = jnp.arange(H)[::-1]
      self.scale = 2.0

    def initial_state(self) -> Any:
      return [jnp.zeros(H), jnp.ones(H)]

    def __call__(self, state: Any, x: jax.Array, key: jax.Array | None) -> Any:
      state = list(state)
      for number, cell in enumerate(self.cells):
        x = state[number] = cell(x, state[number])
      return state, self.scale * self.readout(self.dropout(x, key=key))[self.order]

  model = nn.from_equinox(Tagger)
  params = trained(model)
  assert all(
    jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params)
  )
  module = eqx.nn.inference_mode(eqx.combine(params, Tagger(jax.random.key(3))))
  y, state, run = (
    in_two_windows(model, params),
    module.initial_state(),
    jax.jit(lambda state, x: module(state, x, None)),
  )
  for step in range(T):
    state, expected = run(state, X[step, 0])
    np.testing.assert_allclose(y[step, 0], expected, atol=1e-5)
  noisy = in_two_windows(model, params, key=KEY)
  assert np.abs(noisy - y).max() > 1e-3
  assert np.abs(noisy[0, 0] - noisy[0, 1]).max() > 1e-3


def join(x: dict[str, jax.Array]) -> jax.Array:
  return jnp.concatenate([x['a'], x['b']], -1)


def train_on_dicts(model: fptt_jax.Model) -> None:
  """Train, predict and evaluate with inputs {'a': [T, B, 1], 'b': [T, B, 2]}."""
  x = {'a': np.ones((4, 2, 1), np.float32), 'b': np.ones((4, 2, 2), np.float32)}
  batch = fptt_jax.Batch(x, np.ones((4, 2, 1), np.float32))
  loss = fptt_jax.losses.sequence_regression()
  trainer = quick_trainer(model, loss, optax.sgd(0.1), method='tbptt', num_windows=2)
  state = trainer.init(KEY, batch)
  state, metrics = trainer.step(state, batch)
  assert np.isfinite(metrics.loss).all()
  assert metrics.grad_norm.min() > 0
  assert trainer.predict(state.params, x).shape == (4, 2, 1)
  totals, _ = trainer.evaluate(state.params, batch)
  assert totals['count'] == 8


def test_inputs_of_equinox_modules_may_be_dicts(eqx: Any) -> None:
  class Cell(eqx.Module):
    cell: Any

    def __init__(self, key: jax.Array):
      self.cell = eqx.nn.GRUCell(3, 1, key=key)

    def initial_state(self) -> jax.Array:
      return jnp.zeros(1)

    def __call__(self, state: Any, x: Any, key: Any = None) -> Any:
      state = self.cell(join(x), state)
      return state, state

  train_on_dicts(nn.from_equinox(Cell))


def test_inputs_of_haiku_cores_may_be_dicts(hk: Any) -> None:
  class Core(hk.RNNCore):
    def __init__(self) -> None:
      super().__init__()
      self.gru = hk.GRU(1)

    def initial_state(self, batch_size: int) -> Any:
      return jnp.zeros((batch_size, 1))

    def __call__(self, x: Any, state: Any) -> Any:
      return self.gru(join(x), state)

  train_on_dicts(nn.from_haiku(Core, {'a': (1,), 'b': (2,)}))


def test_inputs_of_linen_and_nnx_cells_may_be_dicts() -> None:
  class Cell(linen.Module):
    @linen.compact
    def __call__(self, state: Any, x: Any) -> Any:
      return linen.GRUCell(1)(state, join(x))

    def initialize_carry(self, key: jax.Array, shape: Any) -> jax.Array:
      return jnp.zeros((shape['a'][0], 1))

  class PerStep(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
      self.cell = nnx.GRUCell(3, 1, rngs=rngs)

    def initialize_carry(self, shape: Any, rngs: Any = None) -> jax.Array:
      return jnp.zeros((shape[0], 1))

    def __call__(self, state: Any, x: Any) -> Any:
      return self.cell(state, join(x))

  shapes = {'a': (1,), 'b': (2,)}
  train_on_dicts(nn.from_linen(Cell(), shapes))
  train_on_dicts(nn.from_linen(Cell(), shapes, {'a': 'float32', 'b': 'float32'}))
  with pytest.raises(ValueError, match=r'^dtype must be .*keys of features_shape'):
    nn.from_linen(Cell(), shapes, {'a': 'float32'})
  with pytest.raises(ValueError, match=r'^features_shape must be the shape'):
    nn.from_linen(Cell(), {})
  train_on_dicts(nn.from_nnx(lambda rngs: PerStep(rngs)))


def test_equinox_modules_that_cannot_be_meant(eqx: Any) -> None:
  """A module without steps, a module instance and running statistics raise errors."""
  with pytest.raises(TypeError, match='Linear'):
    nn.from_equinox(lambda key: eqx.nn.Linear(D, H, key=key))
  with pytest.raises(TypeError, match='build'):
    nn.from_equinox(eqx.nn.GRUCell(D, H, key=KEY))
  with pytest.raises(TypeError, match='LayerNorm'):
    nn.from_equinox(lambda key: eqx.nn.BatchNorm(D, 'batch', mode='ema'))


# Haiku.


@pytest.fixture(name='hk')
def haiku() -> Any:
  return pytest.importorskip(
    'haiku', reason='Haiku is not installed for this version of JAX.'
  )


@pytest.mark.parametrize('name', ['LSTM', 'GRU', 'VanillaRNN', 'DeepRNN'])
def test_haiku_cores(hk: Any, name: str) -> None:
  """Windows equal Haiku's unroll over the whole sequence, before and after training."""

  def build() -> Any:
    if name == 'DeepRNN':
      return hk.DeepRNN([hk.LSTM(H), jnp.tanh, hk.GRU(H), hk.Linear(H)])
    return getattr(hk, name)(H)

  def unroll(x: jax.Array) -> jax.Array:
    core = build()
    return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

  model = nn.from_haiku(build, (D,))
  run = jax.jit(hk.transform(unroll).apply)
  for params in (model.init(KEY), trained(model)):
    np.testing.assert_allclose(
      in_two_windows(model, params), run(params, None, X), atol=1e-5
    )


def test_haiku_cores_that_cannot_be_meant(hk: Any) -> None:
  """A module without steps, a trained initial state and running statistics raise
  errors.
  """
  with pytest.raises(TypeError, match='Linear'):
    nn.from_haiku(lambda: hk.Linear(3), (D,))

  class Trained(hk.GRU):
    def initial_state(self, batch_size: Any) -> Any:
      return jnp.broadcast_to(
        hk.get_parameter('start', (H,), init=jnp.zeros), (batch_size, H)
      )

  with pytest.raises(TypeError, match='initial state'):
    nn.from_haiku(lambda: Trained(H), (D,))

  def norm(x):
    return hk.BatchNorm(True, True, 0.9)(x, is_training=True)

  with pytest.raises(TypeError, match='LayerNorm'):
    nn.from_haiku(lambda: hk.DeepRNN([hk.GRU(H), norm]), (D,))
  with pytest.raises(TypeError, match='rows'):
    nn.from_haiku(
      lambda: hk.DeepRNN([hk.GRU(H), lambda x: x - x.mean(0, keepdims=True)]), (D,)
    )


@pytest.mark.parametrize(
  ('module', 'call', 'package'),
  [
    ('equinox', 'from_equinox(lambda key: None)', 'equinox'),
    ('haiku', 'from_haiku(lambda: None, (1,))', 'dm-haiku'),
  ],
)
def test_neither_library_is_needed(module: str, call: str, package: str) -> None:
  """Each is imported on use, and the error names the package to install."""
  program = f"""
import sys
sys.modules[{module!r}] = None
from fptt_jax import nn
try:
  nn.{call}
except ImportError as error:
  assert {package!r} in str(error)
else:
  raise AssertionError
"""
  subprocess.run([sys.executable, '-c', program], check=True)


# Modules of one's own, and back.


class TwoCells(nnx.Module):
  """A per-step module with two cells and a readout, without in_features."""

  def __init__(self, rngs: nnx.Rngs):
    self.first = nnx.GRUCell(D, H, rngs=rngs)
    self.second = nnx.OptimizedLSTMCell(H, H, rngs=rngs)
    self.readout = nnx.Linear(H, H, rngs=rngs)

  def initialize_carry(self, input_shape: Any, rngs: Any = None) -> Any:
    return self.first.initialize_carry(input_shape, rngs), self.second.initialize_carry(
      input_shape, rngs
    )

  def __call__(self, carry: Any, x: jax.Array) -> Any:
    first, h = self.first(carry[0], x)
    second, y = self.second(carry[1], h)
    return (first, second), self.readout(y)


BUILDS = {
  'own module': TwoCells,
  'cell': lambda rngs: nnx.GRUCell(D, H, rngs=rngs),
  'nnx.RNN': lambda rngs: nnx.RNN(nnx.SimpleCell(D, H, rngs=rngs)),
  'layer': lambda rngs: nn.LSTM(D, H, rngs=rngs),
}


@pytest.mark.parametrize('name', BUILDS)
def test_trained_parameters_go_back_into_the_module(name: str) -> None:
  """The module computes the same as the model with the same parameters."""
  build = BUILDS[name]
  model = nn.from_nnx(build)
  params = trained(model)
  expected, module = in_two_windows(model, params), nn.to_nnx(build, params)
  assert type(module) is type(build(nnx.Rngs(0)))
  if name == 'nnx.RNN':
    y = module(X, time_major=True)
  elif name == 'layer':
    _, y = module(module.initial_state(B), X)
  else:
    carry, y = module.initialize_carry((B, D), nnx.Rngs(0)), []
    for x_t in X:
      carry, y_t = module(carry, x_t)
      y.append(y_t)
    y = jnp.stack(y)
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_parameters_by_path_go_into_the_module() -> None:
  """As `state_to_arrays` returns them."""
  params = nn.from_nnx(BUILDS['own module']).init(KEY)
  by_path = fptt_jax.state_to_arrays(params)
  one, other = (
    nnx.to_pure_dict(nnx.state(nn.to_nnx(BUILDS['own module'], given), nnx.Param))
    for given in (params, by_path)
  )
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_other_parameters_do_not_go_into_the_module() -> None:
  """The error names the difference."""
  params = nn.from_nnx(lambda rngs: nnx.GRUCell(D, H + 1, rngs=rngs)).init(KEY)
  with pytest.raises(ValueError, match='params'):
    nn.to_nnx(BUILDS['cell'], params)


class NeedsFeatures(nnx.GRUCell):
  """A cell whose carry is as wide as its inputs, without in_features."""

  def __init__(self, rngs: nnx.Rngs):
    super().__init__(D, D, rngs=rngs)
    self.in_features = None

  def initialize_carry(
    self, input_shape: Any, rngs: Any = None, carry_init: Any = None
  ) -> Any:
    return jnp.zeros(input_shape)


def test_a_carry_that_depends_on_features_needs_them() -> None:
  """The error names in_features."""
  with pytest.raises(TypeError, match='in_features'):
    nn.from_nnx(NeedsFeatures)


# Constants.


class Constants(nnx.Module):
  """Arrays of every kind that are not parameters."""

  def __init__(self) -> None:
    self.jax = jnp.full(1, 2.0)
    self.numpy = np.full(1, 3.0, np.float32)
    self.scalar = np.float32(5.0)
    self.number = 7.0
    self.table = nnx.data({'a': jnp.full(1, 11.0)})
    self.items = nnx.List([jnp.full(1, 13.0)])
    factor = jnp.full((1, 1, 1), 17.0)
    self.function = lambda x: x * factor

  def __call__(self, x: jax.Array) -> jax.Array:
    product = (
      self.jax
      * self.numpy
      * self.scalar
      * self.number
      * self.table['a']
      * self.items[0]
    )
    return self.function(x * product[None, None])


def test_arrays_that_are_no_parameters_are_constants() -> None:
  """They are neither trained nor lost: the output is the inputs times their product."""

  def stack(middle: Any) -> fptt_jax.Model:
    return nn.from_nnx(
      lambda rngs: nn.Sequential(
        nn.LSTM(D, H, rngs=rngs), middle(), nnx.Linear(H, H, rngs=rngs)
      )
    )

  product = 2.0 * 3 * 5 * 7 * 11 * 13 * 17
  model, plain = stack(Constants), stack(lambda: lambda x: x * product)
  params = trained(model)
  assert set(params['layers']) == {0, 2}
  np.testing.assert_allclose(
    in_two_windows(model, params), in_two_windows(plain, params), rtol=1e-5
  )


def test_a_functions_array_made_by_build_is_a_constant() -> None:
  """This also holds in the presence of layers drawn from rngs."""

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    factor = jnp.full((1, 1, H), 2.0)
    return nn.Sequential(nn.GRU(D, H, rngs=rngs), lambda x: x * factor)

  model, plain = nn.from_nnx(build), nn.from_nnx(lambda rngs: nn.GRU(D, H, rngs=rngs))
  params = model.init(KEY)
  np.testing.assert_allclose(
    in_two_windows(model, params),
    2 * in_two_windows(plain, params['layers'][0]),
    rtol=1e-6,
  )


def test_random_constants_and_hidden_parameters_are_refused() -> None:
  """They would differ from init's draws, or never be trained."""

  class Projection(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
      self.matrix = jax.random.normal(rngs.params(), (H, H))

    def __call__(self, x: jax.Array) -> jax.Array:
      return x @ self.matrix

  with pytest.raises(TypeError, match='matrix'):
    nn.from_nnx(lambda rngs: nn.Sequential(nn.GRU(D, H, rngs=rngs), Projection(rngs)))

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    readout = nnx.Linear(H, H, rngs=rngs)
    return nn.Sequential(nn.GRU(D, H, rngs=rngs), lambda x: readout(x))

  with pytest.raises(TypeError, match='Linear'):
    nn.from_nnx(build)


class Frozen(nnx.Variable):
  """A user-defined kind of variable."""


def test_variables_of_other_kinds_are_refused_by_name() -> None:
  """The error names the variable's path."""

  class Scaled(nnx.Module):
    def __init__(self) -> None:
      self.factor = Frozen(jnp.ones(1))

    def __call__(self, x: jax.Array) -> jax.Array:
      return x * self.factor[...]

  with pytest.raises(TypeError, match=r'Frozen at layers\.1\.factor'):
    nn.from_nnx(lambda rngs: nn.Sequential(nn.GRU(D, H, rngs=rngs), Scaled()))


@pytest.mark.parametrize(
  ('adapter', 'package'), [(nn.from_equinox, 'equinox'), (nn.from_haiku, 'haiku')]
)
def test_examples_of_docstrings(adapter: Any, package: str) -> None:
  """The examples run as printed. They are not doctests, which run without the
  packages.
  """
  pytest.importorskip(package)
  _, _, example = inspect.cleandoc(adapter.__doc__).partition('Example::\n\n')
  assert package in example
  exec(inspect.cleandoc(example), {})
