"""Credit across windows: exact influences against back-propagation through time."""

import itertools
from typing import Any

import chex
from credit import (
  LENGTHS,
  SERIES,
  B,
  H,
  T,
  assert_close,
  batch_of,
  collect,
  distance,
  elman,
  first_window,
  stack,
  total_gradient,
  whole_elman_gradient,
)
from flax import nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import influence, losses, nn
from fptt_jax.influence import _snap, _units
from fptt_jax.influence._check import check_map
from fptt_jax.training import _credit, _update

RNN = nn.ElmanRNN
SNAP1 = influence.snap1()
OWN_ONLY = influence.snap1(own_only=True)

pytestmark = pytest.mark.usefixtures('x64')


def learned(features: int, size: int, **options: Any) -> nn.LearnedInitialState:
  return nn.LearnedInitialState(nn.GRU(features, size, **options))


def penalized(features: int, size: int, **options: Any) -> nn.Sequential:
  return nn.Sequential(RNN(features, size, **options), nn.ActivationPenalty(0.3))


def flax_cell(
  features: int, size: int, *, param_dtype: Any, rngs: nnx.Rngs
) -> nnx.GRUCell:
  return nnx.GRUCell(
    features, size, dtype=param_dtype, param_dtype=param_dtype, rngs=rngs
  )


# Stacks test their layers, and the paths from each to those above, in one program.
EXACT = {
  'ragged-uneven': (
    [nn.LSTM, nn.FastGRNN, nn.LRU],
    {'num_windows': 4},
    LENGTHS,
  ),
  'weighted': (
    [nn.GRU, nn.AntisymmetricRNN, nn.IndRNN],
    {'num_windows': 3, 'loss_weights': [0.5, 2.0, 3.0]},
    None,
  ),
  'learned-start-steps': ([learned, flax_cell], {'num_windows': T}, LENGTHS),
  'penalized': ([penalized, nn.IncrementalRNN], {'num_windows': 3}, None),
}


@pytest.mark.parametrize('name', EXACT)
def test_exact_credit_makes_the_windows_gradients_add_up(name: str) -> None:
  """Their sum is the gradient of back-propagation through time."""
  kinds, options, lengths = EXACT[name]
  model = stack(*kinds)
  batch = batch_of()._replace(lengths=lengths)
  got, metrics = total_gradient(model, [batch], influence='rtrl', **options)
  whole, _ = total_gradient(model, [batch], 'bptt_aux', **options)
  assert_close(got, whole)
  # What the windows alone would miss is no rounding.
  assert metrics.credit_norm[0] == 0
  assert (metrics.credit_norm[1:3] > 1e-4).all()


@pytest.mark.parametrize('num_windows', [1, 5, T])
def test_the_sum_does_not_depend_on_the_windows(num_windows: int) -> None:
  """With losses weighted by the lengths of the windows."""
  windows = fptt_jax.make_windows(T, num_windows=num_windows)
  model = elman()
  batch = batch_of()
  got, _ = total_gradient(
    model,
    [batch],
    num_windows=num_windows,
    loss_weights=(windows.ends - windows.starts) / T,
    influence='rtrl',
  )

  def loss(params):
    start = model.initial_state(B)
    _, outputs = model.apply(params, start, jnp.asarray(batch.inputs), None, None)
    return ((outputs - batch.targets) ** 2).mean()

  params = model.init(jax.random.split(jax.random.key(0))[0])
  assert_close(got, jax.grad(loss)(params))


def test_carried_influence_continues_the_sequence() -> None:
  """Two batches with a carried state are one sequence; without, they are two."""
  model = elman()
  long = batch_of(2 * T)
  halves = [
    fptt_jax.Batch(long.inputs[part], long.targets[part])
    for part in (slice(T), slice(T, None))
  ]
  options = dict(num_windows=3, influence='rtrl')
  carried, _ = total_gradient(model, halves, carry_hidden=True, **options)
  assert_close(carried, whole_elman_gradient(2 * T, 6))
  apart, _ = total_gradient(model, halves, **options)
  each, _ = total_gradient(model, halves, 'bptt_aux', num_windows=3)
  assert_close(apart, each)


@pytest.mark.parametrize(
  ('options', 'factor'),
  [
    ({'inner_steps': 2}, 2),
    ({'micro_batches': 2}, 1),
    ({'skip_nonfinite': True, 'return_outputs': True}, 1),
    ({'optimizer': collect(use_grad_fn=True)}, 1),
  ],
  ids=['inner_steps', 'micro_batches', 'skip_nonfinite', 'grad_fn'],
)
def test_exact_credit_with_other_options(options: Any, factor: int) -> None:
  """Each pass over a window has the same credit, wherever its gradient is taken."""
  model = elman()
  batch = batch_of()
  got, _ = total_gradient(model, [batch], num_windows=3, influence='rtrl', **options)
  expected = jax.tree.map(lambda leaf: factor * leaf, whole_elman_gradient())
  assert_close(got, expected)


def record(num_windows: int) -> optax.GradientTransformation:
  """Keep parameters and gradients of each update."""

  def init(params):
    rows = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_windows), params)
    return jnp.zeros([], jnp.int32), rows, rows

  def update(grads, state, params=None):
    number, weights, gradients = state

    def put(rows, leaf):
      return rows.at[number].set(leaf)

    weights = jax.tree.map(put, weights, params)
    gradients = jax.tree.map(put, gradients, grads)
    return grads, (number + 1, weights, gradients)

  return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
  ('method', 'base'),
  [
    ('tbptt', optax.adam(0.1)),
    ('fptt', fptt_jax.fptt(optax.sgd(0.5), alpha=0.5)),
  ],
  ids=['adam', 'fptt'],
)
def test_moving_weights_give_the_derivative_of_the_run_as_it_was(
  method: str, base: optax.GradientTransformation
) -> None:
  """Each gradient is that of its window's loss in one shift of all weights so far."""
  num_windows = 4
  model = elman()
  batch = batch_of()
  optimizer = optax.chain(record(num_windows), base)
  state, _ = total_gradient(
    model, [batch], method, optimizer, num_windows=num_windows, influence='rtrl'
  )
  _, weights, gradients = state[0]
  plan = fptt_jax.make_windows(T, num_windows=num_windows)

  def window_loss(shift, last):
    hidden = model.initial_state(B)
    for k in range(last + 1):
      params = jax.tree.map(lambda w, s, k=k: w[k] + s, weights, shift)
      steps = slice(plan.starts[k], plan.ends[k])
      x = jnp.asarray(batch.inputs[steps])
      hidden, outputs = model.apply(params, hidden, x, None, None)
    return ((outputs - batch.targets[steps]) ** 2).mean()

  zero = jax.tree.map(lambda w: jnp.zeros_like(w[0]), weights)
  for k in range(num_windows):
    expected = jax.grad(window_loss)(zero, k)
    assert_close(jax.tree.map(lambda g, k=k: g[k], gradients), expected)
  moved = jax.tree.map(lambda w: w[-1] - w[0], weights)
  assert optax.tree.norm(moved) > 0.1


def test_attach_keeps_the_value_of_the_hidden_state() -> None:
  """To the last bit, and of integers, too."""
  hidden = {'h': jnp.array([[0.1, jnp.nan]]), 'count': jnp.array([3])}
  window = influence.WindowMap(lambda params, hidden, x, mask: hidden, (), None)
  got = influence.attach(influence.rtrl(), window, {}, hidden, {})
  np.testing.assert_array_equal(got['h'], hidden['h'])
  np.testing.assert_array_equal(got['count'], hidden['count'])


def test_without_an_influence_nothing_is_attached(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """The program of 'none' is the one in which no influence is ever asked for."""

  def refuse(*args):
    raise AssertionError('an influence was used')

  model = elman()
  batch = batch_of()

  def program(**options):
    trainer = fptt_jax.make_trainer(
      model, SERIES, optax.sgd(0.1), method='tbptt', num_windows=3, **options
    )
    state = trainer.init(jax.random.key(0), batch)
    assert state.influence == ()
    return state, str(jax.make_jaxpr(trainer.step)(state, batch))

  state, text = program(influence='none')
  for name in ('attach', 'advance_influence', '_window_map'):
    monkeypatch.setattr(_credit, name, refuse)
  monkeypatch.setattr(_update, 'advance_influence', refuse)
  assert text == program()[1]
  assert 'custom_vjp' not in text
  arrays = fptt_jax.state_to_arrays(state)
  old = {path: array for path, array in arrays.items() if 'influence' not in path}
  assert old.keys() == arrays.keys()


def test_zero_influence_changes_no_gradient() -> None:
  """The first window has none, whatever carries it."""
  model = elman()
  got, metrics = total_gradient(model, [batch_of()], num_windows=1, influence='rtrl')
  plain, none = total_gradient(model, [batch_of()], num_windows=1)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
    np.testing.assert_array_equal(a, b)
  assert metrics.credit_norm[0] == 0
  assert none.credit_norm is None


def test_two_devices_give_what_one_gives() -> None:
  """The influence is split with the rows of the batch."""
  model = elman()
  mesh = jax.sharding.Mesh(jax.devices('cpu')[:2], ('batch',))
  batch = batch_of()
  results = []
  for where in (None, mesh):
    trainer = helpers.quick_trainer(
      model,
      SERIES,
      fptt_jax.fptt(optax.sgd(0.5)),
      num_windows=3,
      influence='rtrl',
      mesh=where,
    )
    state = trainer.init(jax.random.key(0), batch)
    state, metrics = trainer.step(state, batch)
    results.append((state._replace(key=None), metrics))
  assert_close(results[1], results[0])


def test_members_of_a_population_have_influences_of_their_own() -> None:
  """Each trains as it does alone, on its own batch and in one program of two steps."""
  model = elman()
  trainer = fptt_jax.make_trainer(
    model, SERIES, optax.sgd(0.5), method='tbptt', num_windows=3, influence='rtrl'
  )
  keys = jax.random.split(jax.random.key(0), 2)
  batches = [batch_of(seed=seed) for seed in range(2)]
  together = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
  many = fptt_jax.vmap_trainer(trainer, own_batches=True)
  twice = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), together)
  states, _ = fptt_jax.scan_train_steps(many)(many.init(keys, together), (), twice)
  for member in range(2):
    state = trainer.init(keys[member], batches[member])
    for _ in range(2):
      state, _ = trainer.step(state, batches[member])
    got = fptt_jax.take_member(states, member)
    assert_close(got._replace(key=None), state._replace(key=None))


def test_an_influence_that_is_not_finite_is_dropped_by_rows() -> None:
  """The update is skipped, the row's influence starts anew, and training goes on."""
  model = elman()
  trainer = helpers.quick_trainer(
    model,
    SERIES,
    optax.sgd(0.1),
    method='tbptt',
    num_windows=3,
    influence='rtrl',
    carry_hidden=True,
    skip_nonfinite=True,
  )
  state = trainer.init(jax.random.key(0), batch_of())
  state, _ = trainer.step(state, batch_of())
  broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), state.influence)
  state, metrics = trainer.step(state._replace(influence=broken), batch_of(seed=1))
  np.testing.assert_array_equal(metrics.skipped, [True, False, False])
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
  ended = trainer.end_epoch(state)
  assert optax.tree.norm(ended.influence) == 0


def test_an_influence_of_ones_own() -> None:
  """A constant credit is added to each window's gradient, and each window gets a key of
  its own.
  """

  def advance(window, params, hidden, state, key):
    drawn = jnp.full((B, 1), jax.random.uniform(key))
    return jnp.concatenate([state[:, 1:], drawn], axis=1)

  own = influence.Influence(
    init=lambda window, params, hidden: jnp.zeros((B, 3)),
    credit=lambda window, params, *rest: optax.tree.full_like(params, 2.0),
    advance=advance,
    draws=True,
  )
  model = elman()
  trainer = helpers.quick_trainer(
    model, SERIES, collect(), method='tbptt', num_windows=3, influence=own
  )
  state, _ = trainer.step(trainer.init(jax.random.key(0), batch_of()), batch_of())
  plain, _ = total_gradient(model, [batch_of()], num_windows=3)
  assert_close(state.opt_state, jax.tree.map(lambda leaf: leaf + 6.0, plain))
  assert len(np.unique(state.influence)) == 3


def test_a_model_in_low_precision_has_its_influence_in_float32() -> None:
  """And gradients that are as exact as its numbers."""
  model = helpers.elman(hidden=H, dtype=jnp.bfloat16)
  batch = helpers.series_batch(T, B, dtype=jnp.bfloat16)
  trainer = helpers.quick_trainer(
    model, SERIES, collect(), method='tbptt', num_windows=3, influence='rtrl'
  )
  state, _ = trainer.step(trainer.init(jax.random.key(0), batch), batch)
  assert {leaf.dtype for leaf in state.influence.values()} == {jnp.dtype('float32')}
  whole, _ = total_gradient(model, [batch], 'bptt_aux', num_windows=3)
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (state.opt_state, whole))
  assert distance(*wide) < 0.03


def test_mixed_precision_differentiates_the_model_that_it_casts() -> None:
  """Also as a plain scan, and unit by unit."""

  def build(rngs):
    half = dict(param_dtype=jnp.bfloat16, rngs=rngs)
    return nn.Sequential(nn.GRU(2, H, **half), nnx.Linear(H, 1, **half))

  model = nn.with_float32_params(nn.from_nnx(build))
  params = model.init(jax.random.key(0))
  state = model.initial_state(B)
  x = jnp.ones((1, B, 2), jnp.bfloat16)
  _, expected = model.apply(params, state, x, None, None)
  _, got = model.plain(params, state, x, None, None)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=0.02)
  [step] = model.own_steps(params, state, x, False).values()
  assert step.transition[0][0].dtype == jnp.bfloat16


def test_the_map_is_run_as_a_plain_scan() -> None:
  """`plain` has a forward derivative, which the hand-written layers lack."""
  model = stack(nn.LSTM, nn.LRU)
  params = model.init(jax.random.key(0))
  x = jnp.asarray(batch_of().inputs)
  hidden = model.initial_state(B)

  def run(apply, x):
    return apply(params, hidden, x, None, None)[1]

  expected = run(model.apply, x)
  got, tangent = jax.jvp(lambda x: run(model.plain, x), (x,), (jnp.ones_like(x),))
  assert_close(got, expected)
  step = 1e-6
  moved = (run(model.apply, x + step) - run(model.apply, x - step)) / (2 * step)
  assert_close(tangent, moved, 1e-7)
  with pytest.raises(TypeError, match='custom_vjp'):
    jax.jvp(lambda x: run(model.apply, x), (x,), (jnp.ones_like(x),))


def refused(error: type[Exception], match: str, model: Any = None, **options: Any):
  """The error of making a trainer and its first state."""
  model = elman() if model is None else model
  options = {'method': 'tbptt', 'influence': 'rtrl'} | options

  def start():
    trainer = fptt_jax.make_trainer(model, SERIES, optax.sgd(0.1), **options)
    trainer.init(jax.random.key(0), batch_of())

  with pytest.raises(error, match=match):
    start()


@pytest.mark.parametrize('name', influence.INFLUENCES)
def test_shapes_of_a_batch_suffice_to_start(name: str) -> None:
  """The state is that of the batch itself."""
  trainer = fptt_jax.make_trainer(
    stack(RNN), SERIES, optax.sgd(0.1), method='tbptt', num_windows=4, influence=name
  )
  batch = batch_of()
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch
  )
  key = jax.random.key(0)
  expected = trainer.init(key, batch).influence
  assert_close(trainer.init(key, shapes).influence, expected)


def test_refused_influences() -> None:
  """Each error names what it got."""
  refused(
    ValueError,
    r"influence must be one of \['none', 'rtrl'.*got 'rtlr'",
    influence='rtlr',
  )
  refused(ValueError, r'influence must be one of .*got 3', influence=3)
  for method in ('bptt', 'bptt_aux', 'ftrl'):
    refused(
      ValueError,
      rf"influence .*'{method}', got 'rtrl'",
      method=method,
    )
  refused(
    ValueError,
    "influence .*'tbptt_final', got 'rtrl'",
    method='tbptt_final',
    truncation_steps=2,
  )
  mesh = jax.sharding.Mesh(jax.devices('cpu')[:2], ('batch',))
  refused(
    ValueError,
    "influence .*shard_params=True, got 'rtrl'",
    mesh=mesh,
    shard_params=True,
  )


def test_refused_models(monkeypatch: pytest.MonkeyPatch) -> None:
  """Noise in the recurrent part, complex states, and tables that are too large."""

  def noisy(rngs):
    return nn.Sequential(
      nnx.Dropout(0.5), nn.GRU(2, H, rngs=rngs), nnx.Linear(H, 1, rngs=rngs)
    )

  said = 'hidden state .*with and without a random key, got a relative difference'
  refused(ValueError, said, nn.from_nnx(noisy))
  model = helpers.elman(hidden=H)
  refused(
    ValueError,
    r'state .*real numbers, got .complex64',
    model._replace(
      initial_state=lambda size: jnp.zeros((size, H), jnp.complex64),
      apply=lambda params, h, x, mask, key: (h, x @ params['a'] @ params['v']),
    ),
  )
  # B N P numbers of 8 bytes: 2 · 3 · (6 + 3 + 9) · 8.
  refused(
    ValueError,
    r'max_bytes=863 bytes, got 864\. .* B=2 rows times N=3 numbers .* P=18 ',
    elman(),
    influence=influence.rtrl(max_bytes=863),
  )
  monkeypatch.setattr(_snap, 'MAX_BYTES', 863)
  refused(
    ValueError,
    r"influence snap\(2\) must be at most .*863 bytes, got 864\. .*Use 'snap1'\.$",
    elman(),
    influence=influence.snap(2),
  )
  with pytest.raises(ValueError, match=r'max_bytes must be an integer >= 1.*got 0'):
    influence.rtrl(max_bytes=0)


def test_dropout_after_the_recurrent_layers_is_no_obstacle() -> None:
  """The readout's noise does not reach the state."""
  model = helpers.lstm(hidden=H, dtype=jnp.float64, dropout=0.5)
  _, metrics = total_gradient(model, [batch_of()], num_windows=3, influence='rtrl')
  assert (metrics.credit_norm[1:] > 0).all()


# Influence of each parameter on its own unit.


class ResetBeforeGRU(nn.GRU):
  """A GRU whose reset gate acts before the recurrent matrix."""

  def __init__(self, *sizes: int, **options: Any):
    super().__init__(*sizes, implementation='scan', **options)

  def step(self):
    w_x, w_h, bias = self.w_x[...], self.w_h[...], self.bias[None]

    def step(h, x_t):
      x_r, x_z, x_n = jnp.split(x_t @ w_x + bias, 3, axis=-1)
      w_r, w_z, w_n = jnp.split(w_h, 3, axis=1)
      r = jax.nn.sigmoid(x_r + h @ w_r)
      z = jax.nn.sigmoid(x_z + h @ w_z)
      h = (1 - z) * jnp.tanh(x_n + (r * h) @ w_n) + z * h
      return h, h

    return step

  def own_step(self, state, x_t, own_only):
    return None


def elementwise_lstm() -> fptt_jax.Model:
  """An LSTM whose gates read no other unit: c' = f c + (1 - f) g, h' = o tanh(c')."""

  def init(key):
    w, u, v = jax.random.split(key, 3)
    return {
      'w': jax.random.normal(w, (2, 3 * H)),
      'u': jax.random.normal(u, (3 * H,)),
      'v': jax.random.normal(v, (H, 1)),
    }

  def apply(params, state, x, mask, key):
    def step(state, inputs):
      x_t, mask_t = inputs
      h, c = state
      f, g, o = jnp.split(x_t @ params['w'] + params['u'][None] * jnp.tile(h, 3), 3, 1)
      f = jax.nn.sigmoid(f)
      c = f * c + (1 - f) * jnp.tanh(g)
      new = (jax.nn.sigmoid(o) * jnp.tanh(c), c)
      if mask_t is not None:
        new = jax.tree.map(lambda a, b: jnp.where(mask_t[:, None], a, b), new, state)
      return new, new[0]

    state, hs = jax.lax.scan(step, state, (x, mask))
    return state, hs @ params['v']

  return fptt_jax.Model(init, lambda size: (jnp.zeros((size, H)),) * 2, apply)


APART = {
  'lru': lambda: stack(nn.LRU),
  'indrnn': lambda: stack(nn.IndRNN),
  'elementwise lstm': elementwise_lstm,
}


@pytest.mark.parametrize('name', APART)
def test_units_that_are_apart_need_one_number_per_parameter(name: str) -> None:
  """Credit is exact, and as small as that of one unit."""
  model = APART[name]()
  batch = batch_of()._replace(lengths=LENGTHS)
  trainer = helpers.quick_trainer(
    model, SERIES, collect(), method='tbptt', num_windows=4, influence='rtrl'
  )
  state = trainer.init(jax.random.key(0), batch)
  weights = dict(fptt_jax.state_to_arrays(state.params))
  arrays = len(jax.tree.leaves(state.hidden))
  for path, leaf in state.influence.items():
    assert leaf.size == B * arrays * weights[path].size
  state, _ = trainer.step(state, batch)
  whole, _ = total_gradient(model, [batch], 'bptt_aux', num_windows=4)
  assert_close(state.opt_state, whole)


def test_parameters_that_reach_several_units_are_left_out() -> None:
  """The reset gate that acts before the matrix, and the layer before the first one."""

  def build(rngs):
    return nn.Sequential(nnx.Linear(2, 2, rngs=rngs), ResetBeforeGRU(2, H, rngs=rngs))

  model = nn.from_nnx(build)
  params = model.init(jax.random.key(0))
  window = first_window(model, helpers.series_batch(T, B), slice(T))
  hidden = model.initial_state(B)
  state = SNAP1.init(window, params, hidden)
  assert set(state) == {'layers/1/w_x', 'layers/1/w_h', 'layers/1/bias'}
  advance = helpers.quick(
    lambda state: SNAP1.advance(window, params, hidden, state, None)
  )
  state = advance(state)
  for leaf in state.values():
    np.testing.assert_array_equal(leaf[..., :H], 0)
    assert (leaf[..., H:] != 0).all()


def test_units_of_a_wide_layer_are_all_found() -> None:
  """One unit for each column, though some derivatives are small."""
  kinds = {'w_x': (1, 256), 'w_h': (1, 256), 'bias': (256,)}
  model = nn.from_nnx(lambda rngs: nn.Sequential(nn.LSTM(3, 64, rngs=rngs)))
  params = model.init(jax.random.key(0))
  window = first_window(model, helpers.series_batch(T, B, 3), slice(T))
  [layer] = _units.find_units(window, params, model.initial_state(B)).layers
  for name, shape in kinds.items():
    found = layer.units[f'layers/0/{name}']
    np.testing.assert_array_equal(found, np.tile(np.arange(64), 4).reshape(shape))


OWN = {'lstm': nn.LSTM, 'gru': nn.GRU, 'rnn': RNN}


@pytest.mark.parametrize('name', OWN)
def test_own_transitions_are_the_diagonals_of_a_steps_derivative(name: str) -> None:
  """And without recurrent matrices those of a layer whose matrix has no diagonal."""
  layer = OWN[name](2, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), layer.initial_state(B)
  )
  x = jnp.asarray(rng.normal(size=(B, 2)))

  def stacked(step):
    return jnp.stack([jnp.stack(row, 1) for row in step.transition], 1)

  def diagonals(layer):
    derivative = jax.jacfwd(lambda state: layer.step()(state, x)[0])(state)
    size = len(jax.tree.leaves(state))
    blocks = [jnp.einsum('bubu->bu', leaf) for leaf in jax.tree.leaves(derivative)]
    return jnp.stack(blocks, 1).reshape(B, size, size, H)

  assert_close(stacked(layer.own_step(state, x, False)), diagonals(layer))
  gates = layer.w_h.shape[1] // H
  without = layer.w_h[...] * (1 - jnp.tile(jnp.eye(H), gates))
  layer.w_h[...] = without
  expected = diagonals(layer)
  assert_close(stacked(layer.own_step(state, x, True)), expected)


@pytest.mark.parametrize('kind', ['snap1', 'lookback'])
def test_batches_may_differ_in_shape(kind):
  """Without `carry_hidden` the influence starts anew with each batch, as the hidden
  state does: a smaller last batch and another length give what they give alone.
  """
  trainer = fptt_jax.make_trainer(
    helpers.elman(),
    losses.terminal_regression(),
    optax.sgd(0.1),
    method='tbptt',
    num_windows=2,
    influence=kind,
    donate=False,
  )
  first = helpers.regression_batch(4, 3)
  state, _ = trainer.step(trainer.init(jax.random.key(0), first), first)
  for num_steps, rows in ((4, 2), (6, 3)):
    batch = helpers.regression_batch(num_steps, rows, seed=1)
    alone = trainer.init(jax.random.key(0), batch)
    alone = alone._replace(params=state.params, step_count=state.step_count)
    got, _ = trainer.step(state, batch)
    expected, _ = trainer.step(alone, batch)
    chex.assert_trees_all_equal(got.params, expected.params)


@pytest.mark.parametrize(('parent', 'kind'), [(nn.LRU, 'rtrl'), (nn.LSTM, 'snap1')])
def test_a_subclass_with_a_call_of_its_own_has_its_own_influence(parent, kind):
  """Not that of its parent's step. With two windows `'lookback'` is exact, and so is
  `'snap1'` for a layer of one unit.
  """

  class Scaled(parent):
    def __call__(self, state, x, mask=None, key=None):
      return super().__call__(state, 3 * x, mask, key)

  batch = fptt_jax.Batch(
    jax.random.normal(jax.random.key(0), (6, 1, 1)), jnp.ones([1], jnp.float32)
  )
  norms = {}
  for name in ('lookback', kind):
    model = nn.from_nnx(
      lambda rngs: nn.Sequential(Scaled(1, 1, rngs=rngs), nnx.Linear(1, 1, rngs=rngs))
    )
    trainer = fptt_jax.make_trainer(
      model,
      losses.terminal_regression(),
      optax.sgd(0.0),
      method='tbptt',
      num_windows=2,
      influence=name,
    )
    _, metrics = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    norms[name] = metrics.credit_norm[1]
  np.testing.assert_allclose(norms[kind], norms['lookback'], rtol=1e-5)
  assert norms[kind] > 0


@pytest.mark.parametrize('parent', [nn.GRU, nn.LRU, nn.IndRNN])
def test_a_subclass_with_a_step_of_its_own_runs_it(parent):
  """Not its parent's faster forms; derivatives of its own, given or not, go without
  the kernel.
  """

  class Leaky(parent):
    def step(self):
      whole = super().step()

      def leaky(state, x_t):
        new, y = whole(state, x_t)
        return jax.tree.map(lambda a, b: 0.5 * (a + b), new, state), y

      return leaky

  class Known(Leaky):
    def own_step(self, state, x_t, own_only):
      return None

  class Given(Leaky):
    def own_step(self, state, x_t, own_only):
      whole = super().own_step(state, x_t, own_only)
      half = [[part / 2 for part in row] for row in whole.transition]
      for number in range(len(half)):
        half[number][number] = half[number][number] + 0.5
      products = [
        product._replace(
          gains=jax.tree.map(lambda gain: gain / 2, product.gains),
        )
        for product in whole.products
      ]
      return influence.OwnStep(tuple(map(tuple, half)), tuple(products))

  found = []
  for kind, implementation in (
    (Leaky, 'auto'),
    (Leaky, 'scan'),
    (Known, 'auto'),
    (Given, 'auto'),
  ):
    model = nn.from_nnx(
      lambda rngs, kind=kind, implementation=implementation: kind(
        2, H, implementation=implementation, rngs=rngs
      )
    )
    params = model.init(jax.random.key(0))
    state = model.initial_state(B)
    x = jax.random.normal(jax.random.key(1), (5, B, 2))
    window = influence.WindowMap(
      lambda params, hidden, x, mask, model=model: model.apply(
        params, hidden, x, mask, None
      )[0],
      x,
      None,
      own_steps=model.own_steps,
      own_kernels=model.own_kernels,
    )
    method = influence.snap1()
    start = method.init(window, params, state)
    moved = method.advance(window, params, state, start, None)
    found.append((model.apply(params, state, x, None, None), moved))
  for other in found[1:]:
    chex.assert_trees_all_close(found[0], other, rtol=1e-5, atol=1e-6)


def snap_by_definition(
  model: fptt_jax.Model, params: Any, inputs: Any, units: bool, own_only: bool
) -> Any:
  """M' = Z (J M + I) step by step, for one row, {path: [N, ...]}.

  Z has what a parameter reaches in a step or, with `units`, all arrays of these units.
  With `own_only` J is without what a unit of a first layer with one bias per gate reads
  of its own output: the derivative with respect to the biases times the weight.
  """
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  h, unravel_hidden = jax.flatten_util.ravel_pytree(model.initial_state(1))

  def step(flat, h, x_t):
    state = unravel_hidden(h)
    state, _ = model.plain(unravel(flat), state, x_t[None, None], None, None)
    h = jax.flatten_util.ravel_pytree(state)[0]
    return h, h

  @helpers.quick
  def advance(h, matrix, x_t):
    derivative = jax.jacrev(step, argnums=(0, 1), has_aux=True)
    (direct, jacobian), h = derivative(flat, h, x_t)
    if own_only:
      of_bias = jax.vmap(unravel)(direct)['layers'][0]['bias'].reshape(len(h), -1, H)
      w_h = unravel(flat)['layers'][0]['w_h'].reshape(H, -1, H)
      own = jnp.einsum('ngu,ugu->nu', of_bias, w_h)
      jacobian = jacobian.at[:, :H].add(-own)
    reached = direct != 0
    if units:
      reached = reached.reshape(-1, H, len(flat)).any(0)
      reached = jnp.tile(reached, (len(h) // H, 1))
    return h, jnp.where(reached, jacobian @ matrix + direct, 0)

  matrix = jnp.zeros((len(h), len(flat)))
  for x_t in jnp.asarray(inputs):
    h, matrix = advance(h, matrix, x_t)
  return fptt_jax.state_to_arrays(jax.vmap(unravel)(matrix))


@pytest.mark.parametrize(
  ('kind', 'method'),
  [
    (nn.LSTM, SNAP1),
    (nn.FastGRNN, SNAP1),
    (nn.GRU, SNAP1),
    (RNN, SNAP1),
    (nn.LSTM, influence.snap(1)),
    (nn.LSTM, OWN_ONLY),
  ],
  ids=['lstm', 'fastgrnn', 'gru', 'rnn', 'masked-lstm', 'own-only-lstm'],
)
def test_windows_of_snap1_give_what_steps_give_by_definition(
  kind: Any, method: influence.Influence
) -> None:
  """Whether a layer gives its transitions or not, and under the mask of one step."""
  model = stack(kind)
  params = model.init(jax.random.key(0))
  batch = batch_of()
  hidden = model.initial_state(B)
  window = first_window(model, batch, slice(0, 3))
  state = method.init(window, params, hidden)

  @helpers.quick
  def advance(x, hidden, state):
    moved = window._replace(x=x)
    state = method.advance(moved, params, hidden, state, None)
    return window.run(params, hidden, x, None), state

  for steps in (slice(0, 3), slice(3, 6)):
    hidden, state = advance(jnp.asarray(batch.inputs[steps]), hidden, state)
  own = method in (SNAP1, OWN_ONLY)
  expected = snap_by_definition(
    model, params, batch.inputs[:, 0], units=own, own_only=method is OWN_ONLY
  )
  for path, leaf in state.items():
    whole = expected[path]
    if own:
      # Of the units of an array, one is not 0. Arrays stand before the last axis.
      whole = whole.reshape(-1, H, *whole.shape[1:]).sum(1)
      whole = jnp.moveaxis(whole, 0, -2) if whole.ndim > 1 else whole
    assert_close(leaf[0], whole)


def ring() -> fptt_jax.Model:
  """Units that read themselves and a neighbor, so that effects spread step by step."""
  size = 4

  def init(key):
    a, b, c = (jax.random.normal(part, (size,)) for part in jax.random.split(key, 3))
    return {'a': a[None], 'own': b, 'next': c}

  def apply(params, h, x, mask, key):
    def step(h, x_t):
      drive = params['own'][None] * h + params['next'][None] * jnp.roll(h, 1, 1)
      h = jnp.tanh(x_t[:, :1] @ params['a'] + drive)
      return h, h

    h, hs = jax.lax.scan(step, h, x)
    return h, hs.sum(2, keepdims=True)

  return fptt_jax.Model(init, lambda size_: jnp.zeros((size_, size)), apply)


def test_tokens_beyond_a_table_do_not_widen_a_pattern() -> None:
  """Their embedding is NaN, which tells nothing of what a weight reaches."""
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(
      nnx.Embed(4, 2, rngs=rngs), nn.GRU(2, H, rngs=rngs), nnx.Linear(H, 1, rngs=rngs)
    )
  )
  params = model.init(jax.random.key(0))
  hidden = model.initial_state(B)
  window = influence.WindowMap(
    lambda params, hidden, x, mask: model.plain(params, hidden, x, mask, None)[0],
    jnp.zeros((3, B), jnp.int32),
    None,
  )
  pattern = _snap._find_pattern(window, params, hidden, 1)
  # A column of a gate's matrix reaches one unit.
  np.testing.assert_allclose(pattern['layers/1/w_h'].mean(), 1 / H)


def test_larger_patterns_leave_smaller_errors() -> None:
  """Down to none once every unit is within reach."""
  model = ring()
  batch = batch_of()
  whole, _ = total_gradient(model, [batch], 'bptt_aux', num_windows=6)
  errors = []
  for n in (1, 2, 4):
    options = dict(num_windows=6, influence=influence.snap(n))
    errors.append(distance(total_gradient(model, [batch], **options)[0], whole))
  assert errors[0] > errors[1] > 1e-6
  assert errors[2] < 1e-10


def test_snap1_of_a_stack_is_exact_for_the_upper_layer_alone() -> None:
  """If its units are apart."""
  model = stack(learned, nn.LRU)
  batch = batch_of()._replace(lengths=LENGTHS)
  options = dict(num_windows=4)
  got, _ = total_gradient(model, [batch], influence='snap1', **options)
  cut, _ = total_gradient(model, [batch], **options)
  whole, _ = total_gradient(model, [batch], 'bptt_aux', **options)
  lower, upper, readout = (whole['layers'][number] for number in range(3))
  assert_close(got['layers'][1], upper)
  assert_close(got['layers'][2], readout)
  assert distance(cut['layers'][1], upper) > 0.1
  assert distance(got['layers'][0], lower) > 0.1


def test_own_only_leaves_out_what_units_pass_to_themselves() -> None:
  """The error is smaller than that of the windows, and another than SnAp-1's."""
  batch = batch_of()
  own = influence.snap1(own_only=True)
  model = stack(nn.GRU)
  whole, _ = total_gradient(model, [batch], 'bptt_aux', num_windows=6)
  errors = []
  for kind in ('none', own, 'snap1'):
    got, _ = total_gradient(model, [batch], influence=kind, num_windows=6)
    errors.append(distance(got, whole))
  assert errors[0] > errors[1]
  assert errors[0] > errors[2]
  assert abs(errors[1] - errors[2]) > 1e-6


def test_refused_units() -> None:
  """Models without own units, or without own transitions."""
  refused(
    ValueError,
    "influence 'snap1' .*a single unit .* without such parameters",
    stack(nn.IncrementalRNN),
    influence='snap1',
  )
  refused(
    ValueError,
    r'own_only=True .*own_step .*got \[\(0,\)\]',
    stack(nn.FastGRNN),
    influence=influence.snap1(own_only=True),
  )
  with pytest.raises(ValueError, match=r'n must be an integer >= 1, got 0'):
    influence.snap(0)


def test_memory_does_not_grow_with_the_sequence() -> None:
  """With windows of one size."""
  model = elman()

  def temporary_bytes(num_steps):
    trainer = fptt_jax.make_trainer(
      model, SERIES, optax.sgd(0.1), method='tbptt', window_size=3, influence='snap1'
    )
    batch = jax.eval_shape(lambda: batch_of(num_steps))
    state = jax.eval_shape(trainer.init, jax.random.key(0), batch)
    compiled = helpers.optimized(trainer.step.lower(state, batch))
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporary_bytes(12), temporary_bytes(240)
  # The windows' losses and norms, of a few numbers each.
  assert long - short < 80 * 64


def test_credit_reaches_a_cue_that_no_window_reaches() -> None:
  """A value shown at the first step of twelve, and asked for in the last of 4 windows.

  The windows alone learn the mean of the values, with an error of 1/12.
  """
  num_batches = 120
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(nn.GRU(2, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs))
  )

  def make_batch(source, key):
    values = jax.random.uniform(key, (32,), jnp.float32)
    cue = jnp.stack([values, jnp.ones_like(values)], 1)
    inputs = jnp.zeros((12, 32, 2), jnp.float32).at[0].set(cue)
    return fptt_jax.Batch(inputs, values)

  keys = jax.random.split(jax.random.key(1), num_batches)
  errors = {}
  for name in ('none', 'snap1'):
    trainer = fptt_jax.make_trainer(
      model,
      losses.terminal_regression(),
      optax.adam(0.01),
      method='tbptt',
      num_windows=4,
      loss_weights=[0, 0, 0, 1],
      influence=name,
    )
    state = trainer.init(jax.random.key(0), make_batch((), keys[0]))
    _, metrics = fptt_jax.scan_train_steps(trainer, make_batch)(state, (), keys)
    errors[name] = metrics.loss[-20:, -1].mean()
  assert errors['none'] > 0.07
  assert errors['snap1'] < 0.005


@pytest.mark.parametrize('kind', ['rtrl', 'snap1'])
def test_units_that_are_off_at_some_points_have_an_influence(kind):
  """With rectifiers, units may be off at each of the first points that are probed."""
  size = 16
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(
      nn.IndRNN(1, size, param_dtype=jnp.float64, rngs=rngs),
      nnx.Linear(size, 1, param_dtype=jnp.float64, rngs=rngs),
    )
  )
  batch = helpers.series_batch(8, 3, 1, dtype=np.float64)
  whole, _ = total_gradient(model, [batch], 'bptt_aux', num_windows=4)
  got, _ = total_gradient(model, [batch], num_windows=4, influence=kind)
  assert_close(got, whole)


def unit_model(
  step: Any, parts: int = 1, **shapes: tuple[tuple[int, ...], float]
) -> fptt_jax.Model:
  """A layer of four units by its step; a parameter has a shape and a mean."""
  size = 4

  def init(key: jax.Array) -> dict[str, jax.Array]:
    return {
      name: mean + 0.03 * jax.random.normal(jax.random.fold_in(key, number), shape)
      for number, (name, (shape, mean)) in enumerate(shapes.items())
    }

  def apply(params, state, x, mask, key):
    del mask, key

    def one(state, x_t):
      state = step(params, state, x_t)
      return state, state[0]

    return jax.lax.scan(one, state, x)

  def start(rows: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((rows, size), jnp.float64) for _ in range(parts))

  return fptt_jax.Model(init, start, apply)


def turn(params, state, x):
  """A linear layer of complex numbers, kept as real and imaginary parts."""
  real, imaginary = state
  z = (real + 1j * imaginary) * params['l'][None] * jnp.exp(1j) + x[:, :1] * params[
    'w'
  ][None]
  return jnp.real(z), jnp.imag(z)


HIDDEN_STRUCTURE = {
  'tokens': unit_model(
    lambda p, h, x: (jnp.tanh(p['table'][x] + p['u'][None] * h[0]),),
    table=((7, 4), 0.2),
    u=((4,), 0.5),
  ),
  'root': unit_model(
    lambda p, h, x: (
      p['a'][None] * h[0] + jnp.sqrt(1 - p['a'][None] ** 2) * (x @ p['w']),
    ),
    a=((4,), 0.9),
    w=((2, 4), 0.3),
  ),
  'clipped': unit_model(
    lambda p, h, x: (jnp.clip(p['d'], 0.8, 0.999)[None] * h[0] + x @ p['w'],),
    d=((4,), 0.9),
    w=((2, 4), 0.3),
  ),
  'complex': unit_model(turn, 2, l=((4,), 0.8 + 0j), w=((4,), 0.3)),
}


@pytest.mark.parametrize(
  ('name', 'kind'),
  [
    *itertools.product(HIDDEN_STRUCTURE, ['rtrl', 'snap1', 'snap2']),
    *itertools.product(['complex'], ['uoro', 'unit-uoro']),
  ],
)
def test_structure_that_few_points_show_is_found(name: str, kind: str) -> None:
  """Tokens of which few are drawn, parameters outside the domain of a function or
  clipped at most points, and complex ones. Units are apart in all of these, so that
  each way is exact or, with many pairs of factors, close to it.
  """
  model = HIDDEN_STRUCTURE[name]
  batch = fptt_jax.Batch(*helpers.series_batch(T, B, dtype=np.float64)[:2])
  batch = batch._replace(targets=np.repeat(batch.targets, 4, -1))
  if name == 'tokens':
    tokens = np.arange(T * B, dtype=np.int32).reshape(T, B) % 7
    batch = batch._replace(inputs=tokens)
  kinds = {
    'snap2': influence.snap(2),
    'uoro': influence.uoro(pairs=2000),
    'unit-uoro': influence.uoro(pairs=2000, balance='unit'),
  }
  whole, _ = total_gradient(model, [batch], 'bptt_aux', num_windows=3)
  got, metrics = total_gradient(
    model, [batch], num_windows=3, influence=kinds.get(kind, kind)
  )
  assert metrics.credit_norm[1] > 1e-4
  if 'uoro' in kind:
    assert distance(got, whole) < 0.1
  else:
    parts = lambda leaf: jnp.stack([jnp.real(leaf), jnp.imag(leaf)])
    assert_close(jax.tree.map(parts, got), jax.tree.map(parts, whole))


def test_a_number_that_is_always_clipped_counts() -> None:
  """Its derivative is 0 at each point that is looked at, and may not be later."""
  model = unit_model(
    lambda p, h, x: (jnp.clip(p['d'], 50.0, 60.0)[None] / 55 * h[0] + x @ p['w'],),
    d=((4,), 70.0),
    w=((2, 4), 0.3),
  )
  batch = batch_of()._replace(targets=np.zeros((T, B, 4)))
  trainer = helpers.quick_trainer(
    model, SERIES, optax.sgd(0.1), method='tbptt', num_windows=3, influence='rtrl'
  )
  state = trainer.init(jax.random.key(0), batch)
  assert set(state.influence) == {'d', 'w'}


@pytest.mark.parametrize('layer', [nn.IncrementalRNN, nn.IndRNN])
def test_a_layer_that_random_weights_drive_to_infinity_is_no_noise(layer: Any) -> None:
  """Nothing is random here but the point that the model is looked at."""
  model = nn.from_nnx(lambda rngs: layer(1, 96, rngs=rngs))
  params = model.init(jax.random.key(0))
  check_map(model, params, jnp.zeros((400, 2, 1)), 400)


@pytest.mark.parametrize(
  'kind', ['rtrl', influence.synthetic(optax.sgd(1e30), hidden_features=4)]
)
def test_an_influence_that_is_too_large_starts_anew(kind):
  """Where the norm of its credit overflows, later updates are made again."""
  model = helpers.elman(hidden=6)
  strong = model._replace(
    init=lambda key: {
      **model.init(key),
      'b': jnp.zeros(6, jnp.float32),
      'c': 8 * jnp.eye(6, dtype=jnp.float32),
    }
  )
  trainer = helpers.quick_trainer(
    strong if kind == 'rtrl' else model,
    SERIES,
    optax.sgd(0.0),
    method='tbptt',
    window_size=4,
    carry_hidden=True,
    influence=kind,
    skip_nonfinite=True,
  )
  batch = fptt_jax.Batch(
    jnp.zeros((40, B, 2), jnp.float32), jnp.ones((40, B, 1), jnp.float32)
  )
  state = trainer.init(jax.random.key(0), batch)
  skipped = []
  for _ in range(4):
    state, metrics = trainer.step(state, batch)
    skipped.append(metrics.skipped)
  skipped = np.concatenate(skipped)
  assert skipped.any()
  # Each skip is followed by an update that is made.
  assert not (skipped[1:] & skipped[:-1]).any()


def test_a_bad_gradient_leaves_the_influence():
  """NaN from the window's own loss says nothing about what lies before it."""
  trainer = helpers.quick_trainer(
    helpers.elman(),
    losses.from_function(lambda outputs, targets, window: jnp.sqrt(outputs * 0).mean()),
    optax.sgd(0.0),
    method='tbptt',
    num_windows=2,
    carry_hidden=True,
    influence='rtrl',
    skip_nonfinite=True,
  )
  batch = helpers.series_batch(4, 2)
  state = trainer.init(jax.random.key(0), batch)
  old = jax.tree.map(jnp.ones_like, state.influence)
  state, metrics = trainer.step(state._replace(influence=old), batch)
  assert metrics.skipped.all()
  assert not np.isfinite(metrics.credit_norm).any()
  chex.assert_trees_all_equal(state.influence, old)


def test_a_masked_window_takes_no_place_of_lookback():
  """A window without a valid step between two others changes nothing."""
  batch = batch_of()
  x, y = batch.inputs[:4], batch.targets[:4]
  gap = np.zeros_like(x[:2])
  mask = np.ones((6, B), bool)
  mask[2:4] = False
  apart = fptt_jax.Batch(
    np.concatenate([x[:2], gap, x[2:]]),
    np.concatenate([y[:2], np.zeros_like(y[:2]), y[2:]]),
    mask=mask,
  )
  model = elman()
  plain = fptt_jax.Batch(x, y)
  expected, _ = total_gradient(model, [plain], num_windows=2, influence='lookback')
  got, metrics = total_gradient(model, [apart], num_windows=3, influence='lookback')
  assert metrics.credit_norm[2] > 0
  assert_close(got, expected)


def test_kronecker_refuses_a_layer_that_is_used_twice():
  def build(rngs):
    layer = nn.GRU(2, 2, rngs=rngs)
    return nn.Sequential(layer, layer, nnx.Linear(2, 1, rngs=rngs))

  batch = helpers.series_batch(T, B)
  with pytest.raises(ValueError, match=r'layers must be used once .*layers/1/'):
    total_gradient(nn.from_nnx(build), [batch], num_windows=3, influence='kronecker')


def test_credit_is_that_of_a_replaced_apply() -> None:
  """Exact credit gives the gradient of the whole sequence, of a model whose `apply`
  forgets a fifth of its state after each step, too.
  """
  model = stack(nn.IndRNN)

  def forget(params: Any, hidden: Any, x: Any, mask: Any, key: Any) -> Any:
    def step(hidden: Any, x_t: jax.Array) -> Any:
      hidden, y = model.apply(params, hidden, x_t[None], None, None)
      return jax.tree.map(lambda leaf: 0.8 * leaf, hidden), y[0]

    assert mask is None
    return jax.lax.scan(step, hidden, x)

  changed = model._replace(apply=forget)
  batch = [batch_of()]
  options = dict(num_windows=T)
  whole, _ = total_gradient(changed, batch, 'bptt_aux', **options)
  exact, _ = total_gradient(changed, batch, influence='rtrl', **options)
  chex.assert_trees_all_close(exact, whole, rtol=1e-9)
  other, _ = total_gradient(model, batch, influence='rtrl', **options)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(other, whole, rtol=1e-3)
