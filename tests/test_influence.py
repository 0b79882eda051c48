"""Credit across windows: exact influences against back-propagation through time."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import fptt_jax
from fptt_jax import influence, losses, nn
from fptt_jax.training import _window

T, B, H = 6, 2, 3
LENGTHS = np.array([6, 4], np.int32)
SERIES = losses.sequence_regression()
RNN = nn.ElmanRNN

pytestmark = pytest.mark.usefixtures('x64')


def stack(*kinds: Any) -> fptt_jax.Model:
  """Recurrent layers in float64 and a readout."""

  def build(rngs: nnx.Rngs) -> nnx.Module:
    layers = []
    features = 2
    for kind in kinds:
      layers.append(kind(features, H, param_dtype=jnp.float64, rngs=rngs))
      features = H
    return nn.Sequential(*layers, nnx.Linear(H, 1, param_dtype=jnp.float64, rngs=rngs))

  return nn.from_nnx(build)


def learned(features: int, size: int, **options: Any) -> nn.LearnedInitialState:
  return nn.LearnedInitialState(nn.GRU(features, size, **options))


def penalized(features: int, size: int, **options: Any) -> nn.Sequential:
  return nn.Sequential(RNN(features, size, **options), nn.ActivationPenalty(0.3))


def batch_of(num_steps: int = T, seed: int = 0) -> fptt_jax.Batch:
  return problems.series_batch(num_steps, B, seed=seed, dtype=np.float64)


def collect(use_grad_fn: bool = False) -> optax.GradientTransformationExtraArgs:
  """Add up the gradients and leave the parameters alone."""

  def update(grads, total, params=None, *, grad_fn=None, **extra):
    if use_grad_fn:
      grads = grad_fn(params)
    total = jax.tree.map(jnp.add, total, grads)
    return jax.tree.map(jnp.zeros_like, grads), total

  return optax.GradientTransformationExtraArgs(optax.tree.zeros_like, update)


def total_gradient(
  model: fptt_jax.Model,
  batches: list[fptt_jax.Batch],
  method: str = 'tbptt',
  optimizer: Any = None,
  loss: fptt_jax.Loss = SERIES,
  **options: Any,
) -> tuple[Any, fptt_jax.StepMetrics]:
  """The sum of all updates' gradients, and the metrics of the last batch."""
  optimizer = collect() if optimizer is None else optimizer
  trainer = problems.quick_trainer(model, loss, optimizer, method=method, **options)
  state = trainer.init(jax.random.key(0), batches[0])
  for batch in batches:
    state, metrics = trainer.step(state, batch)
  return state.opt_state, metrics


def assert_close(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    scale = max(float(jnp.abs(b).max()), 1e-12)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def distance(got: Any, expected: Any) -> float:
  """The norm of the difference, relative to that of what is expected."""
  difference = jax.tree.map(jnp.subtract, got, expected)
  return float(optax.tree.norm(difference) / optax.tree.norm(expected))


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
  cut, _ = total_gradient(model, [batch], **options)
  assert distance(cut, whole) > 0.03
  assert metrics.credit_norm[0] == 0
  assert (metrics.credit_norm[1:3] > 1e-4).all()


@pytest.mark.parametrize('num_windows', [1, 3, 5, T])
def test_the_sum_does_not_depend_on_the_windows(num_windows: int) -> None:
  """With losses weighted by the lengths of the windows."""
  windows = fptt_jax.make_windows(T, num_windows=num_windows)
  model = problems.elman(hidden=H, dtype=jnp.float64)
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
  model = problems.elman(hidden=H, dtype=jnp.float64)
  long = batch_of(2 * T)
  halves = [
    fptt_jax.Batch(long.inputs[part], long.targets[part])
    for part in (slice(T), slice(T, None))
  ]
  options = dict(num_windows=3, influence='rtrl')
  carried, _ = total_gradient(model, halves, carry_hidden=True, **options)
  whole, _ = total_gradient(model, [long], 'bptt_aux', num_windows=6)
  assert_close(carried, whole)
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
  model = problems.elman(hidden=H, dtype=jnp.float64)
  batch = batch_of()
  got, _ = total_gradient(model, [batch], num_windows=3, influence='rtrl', **options)
  whole, _ = total_gradient(model, [batch], 'bptt_aux', num_windows=3)
  assert_close(got, jax.tree.map(lambda leaf: factor * leaf, whole))


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
    ('tbptt', optax.sgd(0.5)),
    ('tbptt', optax.adam(0.1)),
    ('fptt', fptt_jax.fptt(optax.sgd(0.5), alpha=0.5)),
  ],
  ids=['sgd', 'adam', 'fptt'],
)
def test_moving_weights_give_the_derivative_of_the_run_as_it_was(
  method: str, base: optax.GradientTransformation
) -> None:
  """Each gradient is that of its window's loss in one shift of all weights so far."""
  num_windows = 4
  model = problems.elman(hidden=H, dtype=jnp.float64)
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

  model = problems.elman(hidden=H, dtype=jnp.float64)
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
    monkeypatch.setattr(_window, name, refuse)
  assert text == program()[1]
  assert 'custom_vjp' not in text
  arrays = fptt_jax.state_to_arrays(state)
  old = {path: array for path, array in arrays.items() if 'influence' not in path}
  assert old.keys() == arrays.keys()


def test_zero_influence_changes_no_gradient() -> None:
  """The first window has none, whatever carries it."""
  model = problems.elman(hidden=H, dtype=jnp.float64)
  got, metrics = total_gradient(model, [batch_of()], num_windows=1, influence='rtrl')
  plain, none = total_gradient(model, [batch_of()], num_windows=1)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
    np.testing.assert_array_equal(a, b)
  assert metrics.credit_norm[0] == 0
  assert none.credit_norm is None


def test_two_devices_give_what_one_gives() -> None:
  """The influence is split with the rows of the batch."""
  model = problems.elman(hidden=H, dtype=jnp.float64)
  mesh = jax.sharding.Mesh(jax.devices('cpu')[:2], ('batch',))
  batch = batch_of()
  results = []
  for where in (None, mesh):
    trainer = problems.quick_trainer(
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
  model = problems.elman(hidden=H, dtype=jnp.float64)
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
  model = problems.elman(hidden=H, dtype=jnp.float64)
  trainer = problems.quick_trainer(
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
  """A constant credit is added to each window's gradient, and draws get a key."""

  def advance(window, params, hidden, state, key):
    return state + jax.random.uniform(key)

  own = influence.Influence(
    init=lambda window, params, hidden: jnp.zeros(B),
    credit=lambda window, params, state, d_hidden: optax.tree.full_like(params, 2.0),
    advance=advance,
    draws=True,
  )
  model = problems.elman(hidden=H, dtype=jnp.float64)
  got, _ = total_gradient(model, [batch_of()], num_windows=3, influence=own)
  plain, _ = total_gradient(model, [batch_of()], num_windows=3)
  assert_close(got, jax.tree.map(lambda leaf: leaf + 6.0, plain))


def test_a_model_in_low_precision_has_its_influence_in_float32() -> None:
  """Whether the parameters are kept in float32 or not."""

  def build(rngs):
    half = dict(param_dtype=jnp.bfloat16, rngs=rngs)
    return nn.Sequential(nn.LSTM(2, H, **half), nnx.Linear(H, 1, **half))

  batch = problems.series_batch(T, B)
  model = nn.from_nnx(build)
  gradients = []
  for kept in (model, nn.with_float32_params(model)):
    trainer = problems.quick_trainer(
      kept, SERIES, collect(), method='tbptt', num_windows=3, influence='rtrl'
    )
    state, _ = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    assert {leaf.dtype for leaf in state.influence.values()} == {jnp.dtype('float32')}
    gradients.append(
      jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.opt_state)
    )
  whole, _ = total_gradient(
    nn.with_float32_params(model), [batch], 'bptt_aux', num_windows=3
  )
  assert distance(gradients[1], whole) < 0.03
  assert distance(gradients[0], whole) < 0.06


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
  model = problems.elman(hidden=H, dtype=jnp.float64) if model is None else model
  options = {'method': 'tbptt', 'influence': 'rtrl'} | options

  def start():
    trainer = fptt_jax.make_trainer(model, SERIES, optax.sgd(0.1), **options)
    trainer.init(jax.random.key(0), batch_of())

  with pytest.raises(error, match=match):
    start()


def test_refused_influences() -> None:
  """Each error names what it got."""
  refused(
    ValueError,
    r"influence must be one of \['none', 'rtrl'.*got 'rtlr'",
    influence='rtlr',
  )
  refused(ValueError, r'influence must be one of .*got 3', influence=3)
  refused(
    TypeError,
    r'influence.credit must be a function, got None',
    influence=influence.rtrl()._replace(credit=None),
  )
  for method in ('bptt', 'bptt_aux', 'ftrl'):
    refused(
      ValueError,
      rf"method '{method}' does not cut.*got influence='rtrl'",
      method=method,
    )
  refused(
    ValueError,
    "method 'tbptt_final' .*got influence='rtrl'",
    method='tbptt_final',
    truncation_steps=2,
  )
  mesh = jax.sharding.Mesh(jax.devices('cpu')[:2], ('batch',))
  refused(
    ValueError,
    "got influence='rtrl' and shard_params=True",
    mesh=mesh,
    shard_params=True,
  )


def test_refused_models() -> None:
  """Noise in the recurrent part, complex states, and tables that are too large."""

  def noisy(rngs):
    return nn.Sequential(
      nnx.Dropout(0.5), nn.GRU(2, H, rngs=rngs), nnx.Linear(H, 1, rngs=rngs)
    )

  refused(
    ValueError, 'random key of a window reaches the hidden state', nn.from_nnx(noisy)
  )
  model = problems.elman(hidden=H)
  refused(
    ValueError,
    r"got a state of \['complex64'\]",
    model._replace(
      initial_state=lambda size: jnp.zeros((size, H), jnp.complex64),
      apply=lambda params, h, x, mask, key: (h, x @ params['a'] @ params['v']),
    ),
  )
  # B N P numbers of 8 bytes: 2 · 3 · (6 + 3 + 9) · 8.
  refused(
    ValueError,
    r'max_bytes=863 bytes, got 864: B=2 rows times N=3 numbers .* P=18 ',
    problems.elman(hidden=H, dtype=jnp.float64),
    influence=influence.rtrl(max_bytes=863),
  )
  with pytest.raises(ValueError, match=r'max_bytes must be an integer >= 1.*got 0'):
    influence.rtrl(max_bytes=0)


def test_dropout_after_the_recurrent_layers_is_no_obstacle() -> None:
  """The readout's noise does not reach the state."""
  model = problems.lstm(hidden=H, dtype=jnp.float64, dropout=0.5)
  _, metrics = total_gradient(model, [batch_of()], num_windows=3, influence='rtrl')
  assert (metrics.credit_norm[1:] > 0).all()
