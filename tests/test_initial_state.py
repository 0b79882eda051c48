"""Initial states that are trained, and which hidden state FTRL carries on, against
loops in Python.
"""

from typing import Any

from flax import nnx
import helpers
from helpers import quick, quick_trainer
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import losses, nn
from fptt_jax.training._schedules import METHODS, plan_updates

T, B, K, RATE = 7, 4, 3, 0.3
LENGTHS = np.array([3, 1, 2, 3], np.int32)


def learned_elman() -> fptt_jax.Model:
  """An Elman network by hand with a parameter `h0` [H], a multiple of which each row
  starts from.
  """
  plain = helpers.elman(dtype=jnp.float64)

  def start(params: Any, batch_size: int) -> jax.Array:
    return (1 + jnp.arange(batch_size, dtype=float))[:, None] * params['h0'][None]

  def init(key: jax.Array) -> Any:
    return plain.init(key) | {'h0': jnp.array([0.3, -0.2, 0.1, 0.4])}

  return plain._replace(init=init, learned_initial_state=start)


def make_batch(lengths: np.ndarray | None = None) -> fptt_jax.Batch:
  """Draws sequences with a target per step."""
  return helpers.series_batch(T, B, dtype=np.float64)._replace(lengths=lengths)


def window_loss(
  model: Any, params: Any, hidden: Any, batch: Any, start: int, end: int
) -> tuple[Any, Any]:
  """Runs one window: (mean squared error of its valid steps, hidden state)."""
  steps = np.arange(start, end)[:, None]
  mask = (
    np.ones((end - start, B), bool) if batch.lengths is None else steps < batch.lengths
  )
  hidden, outputs = model.apply(
    params, hidden, batch.inputs[start:end], jnp.asarray(mask), None
  )
  squares = jnp.square(outputs - batch.targets[start:end])[..., 0]
  return jnp.sum(squares, where=mask) / max(mask.sum(), 1), hidden


def train_by_loop(
  model: Any, method: str, batch: Any, inner_steps: int = 1, carried: Any = None
) -> tuple[Any, Any]:
  """Trains on one sequence by plain gradient descent: (parameters, hidden state).
  `carried` is where the sequence goes on.
  """
  params = model.init(jax.random.split(jax.random.key(0))[0])
  windows = fptt_jax.make_windows(T, num_windows=1 if method == 'bptt' else K)
  borders = list(zip(windows.starts.tolist(), windows.ends.tolist(), strict=True))
  updates = plan_updates(METHODS[method], len(borders))
  hidden = carried
  for rows, coefficients in zip(updates.windows, updates.coefficients, strict=True):

    def objective(
      params: Any,
      first: Any = hidden,
      rows: Any = rows,
      coefficients: Any = coefficients,
    ) -> tuple[Any, Any]:
      starts = carried is None and (updates.restarts or rows[0] == 0)
      state = model.start(params, B) if starts else first
      total = 0.0
      for k, coefficient in zip(rows, coefficients, strict=True):
        value, state = window_loss(model, params, state, batch, *borders[k])
        total += coefficient * value
      return total, state

    last = int(np.flatnonzero(coefficients)[-1])
    empty = batch.lengths is not None and borders[rows[last]][0] >= batch.lengths.max()
    for _ in range(inner_steps):
      gradient, hidden = jax.grad(objective, has_aux=True)(params)
      if not empty:
        params = jax.tree.map(lambda p, g: p - RATE * g, params, gradient)
  return params, hidden


def make_trainer(model: Any, method: str, **options: Any) -> fptt_jax.Trainer:
  """Builds the trainer of the same settings; batches are masked everywhere, as the
  loop's are.
  """
  if METHODS[method].num_windows is None:
    options = {'num_windows': K} | options
  return quick_trainer(
    model, losses.sequence_regression(), optax.sgd(RATE), method=method, **options
  )


def assert_close(got: Any, expected: Any) -> None:
  """Compares trees of float64."""
  got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def mesh_of(number: int) -> jax.sharding.Mesh:
  return jax.sharding.Mesh(jax.devices('cpu')[:number], ('batch',))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  ('method', 'options'),
  [
    ('tbptt', {}),
    ('tbptt', {'inner_steps': 2}),
    ('tbptt', {'mesh': 2}),
    ('tbptt', {'mesh': 4, 'shard_params': True, 'inner_steps': 2}),
    ('bptt', {}),
    ('bptt_aux', {'mesh': 2}),
    ('ftrl', {}),
    ('ftrl', {'inner_steps': 2, 'mesh': 2, 'shard_params': True}),
  ],
  ids=str,
)
def test_learned_initial_state_is_trained_as_by_a_loop(
  method: str, options: dict[str, Any]
) -> None:
  """Also where rows start from different multiples of it, on one device and several."""
  expected = train_by_loop(
    learned_elman(), method, make_batch(), options.get('inner_steps', 1)
  )
  if 'mesh' in options:
    options = options | {'mesh': mesh_of(options['mesh'])}
  trainer = make_trainer(learned_elman(), method, **options)
  state, _ = trainer.step(trainer.init(jax.random.key(0), make_batch()), make_batch())
  assert_close((state.params, state.hidden), expected)
  assert_close(trainer.end_epoch(state).hidden, learned_elman().start(state.params, B))
  _, hidden = trainer.evaluate(state.params, make_batch())
  start = learned_elman().start(state.params, B)
  assert_close(hidden, trainer.evaluate(state.params, make_batch(), start)[1])


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('mesh', [None, 2])
def test_carried_sequences_start_from_it_once(mesh: int | None) -> None:
  """With `carry_hidden` the first batch trains it, later ones go on; after an epoch's
  end it is trained again.
  """
  trainer = make_trainer(
    learned_elman(), 'tbptt', carry_hidden=True, mesh=mesh and mesh_of(mesh)
  )
  start = trainer.init(jax.random.key(0), make_batch())
  first, _ = trainer.step(start, make_batch())
  assert_close(
    (first.params, first.hidden), train_by_loop(learned_elman(), 'tbptt', make_batch())
  )
  second, _ = trainer.step(first, make_batch())
  np.testing.assert_array_equal(second.params['h0'], first.params['h0'])
  third, _ = trainer.step(trainer.end_epoch(second), make_batch())
  assert np.abs(third.params['h0'] - second.params['h0']).max() > 1e-3


@pytest.mark.usefixtures('x64')
def test_a_start_may_be_rounded_otherwise() -> None:
  """A state that differs from the initial one by a unit in the last place is it, as if
  another program had computed it; one that differs by more has been carried on.
  """
  trainer = make_trainer(learned_elman(), 'tbptt', carry_hidden=True)
  start = trainer.init(jax.random.key(0), make_batch())
  moved = []
  for hidden in (jnp.nextafter(start.hidden, jnp.inf), start.hidden + 1e-6):
    state, _ = trainer.step(start._replace(hidden=hidden), make_batch())
    moved.append(float(jnp.abs(state.params['h0'] - start.params['h0']).max()))
  assert moved[0] > 1e-3
  assert moved[1] == 0


def test_a_slow_state_in_half_precision_is_carried_on() -> None:
  """It is not taken for the initial state however little it moves."""

  def apply(params: Any, hidden: Any, x: Any, mask: Any, key: Any) -> Any:
    valid = jnp.ones(x.shape[:2], bool) if mask is None else mask
    moved = 0.03125 * jnp.cumsum(valid, 0)[..., None]
    outputs = hidden[None] - moved.astype(jnp.bfloat16)
    return outputs[-1], outputs

  start = lambda params, rows: jnp.broadcast_to(params['h0'][None], (rows, 2))
  model = fptt_jax.Model(
    init=lambda key: {'h0': jnp.array([1.0, 0.5], jnp.bfloat16)},
    initial_state=lambda rows: jnp.zeros((rows, 2), jnp.bfloat16),
    apply=apply,
    learned_initial_state=start,
  )
  trainer = fptt_jax.make_trainer(
    model,
    losses.sequence_regression(),
    optax.sgd(0.0),
    method='tbptt',
    num_windows=1,
    carry_hidden=True,
  )
  batch = fptt_jax.Batch(jnp.ones((1, 1, 1)), jnp.ones((1, 1, 2)))
  state = trainer.init(jax.random.key(0), batch)
  for _ in range(6):
    state, _ = trainer.step(state, batch)
  np.testing.assert_array_equal(np.float32(state.hidden), [[0.8125, 0.3125]])


@pytest.mark.usefixtures('x64')
def test_final_steps_reach_it_only_if_they_are_all() -> None:
  """The steps before them run from it, without a gradient."""
  found = {}
  for truncation_steps in (3, T):
    trainer = make_trainer(
      learned_elman(), 'tbptt_final', truncation_steps=truncation_steps
    )
    start = trainer.init(jax.random.key(0), make_batch())
    state, _ = trainer.step(start, make_batch())
    found[truncation_steps] = np.abs(state.params['h0'] - start.params['h0']).max()
    prefix = learned_elman().start(start.params, B)
    steps = T - truncation_steps
    if steps:
      prefix, _ = learned_elman().apply(
        start.params, prefix, make_batch().inputs[:steps], None, None
      )
    hidden, _ = learned_elman().apply(
      start.params, prefix, make_batch().inputs[steps:], None, None
    )
    assert_close(state.hidden, hidden)
  assert found[3] == 0
  assert found[T] > 1e-3


@pytest.mark.usefixtures('x64')
def test_population_learn_their_own() -> None:
  """Each member of a population is trained as if alone."""
  trainer = fptt_jax.make_trainer(
    learned_elman(),
    losses.sequence_regression(),
    optax.sgd(RATE),
    method='tbptt',
    num_windows=K,
  )
  keys = jax.random.split(jax.random.key(1), 2)
  members = fptt_jax.vmap_trainer(trainer, mesh=mesh_of(2))
  many, _ = members.step(members.init(keys, make_batch()), make_batch())
  for member in range(2):
    one, _ = trainer.step(trainer.init(keys[member], make_batch()), make_batch())
    got = jax.tree.map(
      lambda leaf, r=member: leaf[r],
      (many.params, many.hidden, members.end_epoch(many).hidden),
    )
    assert_close(got, (one.params, one.hidden, trainer.end_epoch(one).hidden))


class OwnStart(nnx.Module):
  """A layer of one's own whose initial state reads a parameter."""

  def __init__(self, rngs: nnx.Rngs):
    self.cell = nn.GRU(2, 3, implementation='scan', param_dtype=float, rngs=rngs)
    self.before = nnx.Param(jax.random.normal(rngs.params(), (3,), float))

  def initial_state(self, batch_size: int) -> jax.Array:
    return jnp.tile(jnp.tanh(self.before[...])[None], (batch_size, 1))

  def __call__(self, state: Any, x: Any, mask: Any = None, key: Any = None) -> Any:
    return self.cell(state, x, mask, key)


LAYERS = {
  'LSTM': lambda rngs: nn.LearnedInitialState(
    nn.LSTM(2, 3, param_dtype=float, rngs=rngs)
  ),
  'LRU': lambda rngs: nn.LearnedInitialState(
    nn.LRU(2, 3, param_dtype=float, rngs=rngs)
  ),
  'dropped': lambda rngs: nn.LearnedInitialState(
    nn.WeightDrop(nn.ElmanRNN(2, 3, param_dtype=float, rngs=rngs), 0.2)
  ),
  'cell': lambda rngs: nn.LearnedInitialState(
    nnx.GRUCell(2, 3, param_dtype=float, rngs=rngs)
  ),
  'own': OwnStart,
}


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  ('kind', 'stacked'),
  [*((kind, True) for kind in LAYERS), ('LSTM', False), ('own', False)],
)
def test_gradient_of_a_learned_initial_state_is_that_of_finite_differences(
  kind: str, stacked: bool
) -> None:
  """Of the evaluated loss, alone and within a stack, with a terminal loss where the
  stack looks at the last output alone.
  """

  def build(rngs: nnx.Rngs) -> Any:
    layer = LAYERS[kind](rngs)
    return (
      nn.Sequential(layer, nnx.Linear(3, 1, param_dtype=float, rngs=rngs))
      if stacked
      else layer
    )

  model = nn.from_nnx(build)
  assert model.learned_initial_state is not None
  loss = losses.terminal_regression()
  batch = helpers.regression_batch(T, B, dtype=np.float64)
  batch = batch._replace(targets=np.ones((B, 1 if stacked else 3)))
  trainer = fptt_jax.make_trainer(model, loss, optax.sgd(RATE), method='bptt')
  flat, unravel = ravel_pytree(model.init(jax.random.key(0)))
  flat = flat + 0.1  # Initial states other than zeros.

  def mean_squares(flat: jax.Array) -> jax.Array:
    params = unravel(flat)
    _, outputs = model.apply(params, model.start(params, B), batch.inputs, None, None)
    return jnp.square(outputs[-1] - batch.targets).mean()

  def difference(step):
    return (mean_squares(flat + step) - mean_squares(flat - step)) / 2e-6

  expected = quick(jax.vmap(difference))(1e-6 * jnp.eye(flat.size))
  state = trainer.init(jax.random.key(0), batch)._replace(params=unravel(flat))

  def evaluated(flat):
    return trainer.evaluate(unravel(flat), batch)[0]['loss'] / B

  np.testing.assert_allclose(
    jax.jit(jax.grad(evaluated))(flat), expected, rtol=1e-5, atol=1e-7
  )
  if kind != 'dropped':  # Its training has noise.
    state, _ = trainer.step(state, batch)
    moved = (flat - ravel_pytree(state.params)[0]) / RATE
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-7)


def test_learned_initial_states_begin_as_the_layers_own() -> None:
  """And every state array has a parameter of one row; integers have none."""
  model = nn.from_nnx(lambda rngs: nn.LearnedInitialState(nn.LSTM(2, 3, rngs=rngs)))
  params = model.init(jax.random.key(0))
  assert [leaf.shape for leaf in jax.tree.leaves(params['initial'])] == [(3,), (3,)]
  own = nn.LSTM(2, 3, rngs=nnx.Rngs(0)).initial_state(5)
  jax.tree.map(np.testing.assert_array_equal, model.start(params, 5), own)
  assert jax.tree.map(jnp.shape, model.initial_state(5)) == jax.tree.map(jnp.shape, own)
  assert (
    nn.from_nnx(lambda rngs: nn.LSTM(2, 3, rngs=rngs)).learned_initial_state is None
  )


def test_float32_parameters_of_a_bfloat16_initial_state() -> None:
  """They are cast as the others are."""
  model = nn.with_float32_params(
    nn.from_nnx(
      lambda rngs: nn.LearnedInitialState(
        nn.ElmanRNN(2, 3, param_dtype=jnp.bfloat16, rngs=rngs)
      )
    )
  )
  params = model.init(jax.random.key(0))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  assert model.start(params, 2).dtype == jnp.bfloat16


def test_initial_states_that_do_not_fit_are_refused() -> None:
  """A learned state of another shape than `initial_state` gives, and a layer without a
  state to learn.
  """
  model = helpers.elman()._replace(
    learned_initial_state=lambda params, batch_size: jnp.zeros((batch_size, 9))
  )
  trainer = fptt_jax.make_trainer(
    model, losses.sequence_regression(), optax.sgd(0.1), method='tbptt'
  )
  with pytest.raises(ValueError, match=r'learned_initial_state.*9'):
    trainer.init(jax.random.key(0), helpers.series_batch(T, B))
  with pytest.raises(TypeError, match=r'layer.*LockedDropout'):
    nn.LearnedInitialState(nn.LockedDropout(0.1))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  ('model', 'inner_steps'),
  [(helpers.elman(dtype=jnp.float64), 1), (learned_elman(), 3)],
  ids=['constant', 'learned'],
)
def test_hidden_state_that_ftrl_carries_on(inner_steps: int, model: Any) -> None:
  """All sequences end in the first two of three windows: the last pass has the
  parameters after the second window's update.
  """
  batch = make_batch(LENGTHS)
  expected = train_by_loop(model, 'ftrl', batch, inner_steps)
  trainer = make_trainer(model, 'ftrl', inner_steps=inner_steps)
  state, _ = trainer.step(trainer.init(jax.random.key(0), batch), batch)
  assert_close((state.params, state.hidden), expected)
  finally_run, _ = model.apply(
    state.params,
    model.start(state.params, B),
    batch.inputs,
    jnp.arange(T)[:, None] < LENGTHS[None],
    None,
  )
  assert_close(state.hidden, finally_run)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('influence', ['none', 'rtrl'])
def test_padding_in_front_leaves_the_learned_start_its_gradient(influence: str) -> None:
  """Also where it covers the first window, so that sequences start in the second."""
  model = learned_elman()
  short = helpers.series_batch(4, B, dtype=np.float64)
  front = np.zeros((2, B))[..., None]
  padded = fptt_jax.Batch(
    np.concatenate([np.zeros((2, B, 2)), short.inputs]),
    np.concatenate([front, short.targets]),
    mask=np.repeat([False, True], [2, 4])[:, None] & np.ones((6, B), bool),
  )
  found = []
  for batch, num_windows in ((short, 2), (padded, 3)):
    trainer = helpers.quick_trainer(
      model,
      losses.sequence_regression(),
      optax.sgd(RATE),
      method='tbptt',
      num_windows=num_windows,
      influence=influence,
    )
    state, _ = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    found.append(state.params)
  helpers.assert_close(found[1], found[0], 1e-10)
  start = model.init(jax.random.split(jax.random.key(0))[0])['h0']
  assert np.abs(found[0]['h0'] - start).min() > 1e-6


def test_a_row_that_has_not_begun_starts_from_the_newest_initial_state():
  """It is idle in the first batch, whose updates move the initial state."""

  def apply(params, h, x, mask, key):
    def step(h, item):
      x_t, valid = item
      new = jnp.tanh(h @ params['w'] + x_t)
      h = jnp.where(valid[:, None], new, h)
      return h, h

    return jax.lax.scan(step, h, (x, mask))

  model = fptt_jax.Model(
    lambda key: {'w': jnp.full((2, 2), 0.3), 's': jnp.array([0.1, -0.2])},
    lambda rows: jnp.zeros((rows, 2)),
    apply,
    learned_initial_state=lambda params, rows: jnp.broadcast_to(
      params['s'][None], (rows, 2)
    ),
  )
  trainer = helpers.quick_trainer(
    model,
    losses.sequence_regression(),
    optax.adam(0.01),
    method='tbptt',
    num_windows=2,
    carry_hidden=True,
  )
  x = np.ones((4, 2, 2), np.float32)
  late = np.array([[False, True]] * 4)
  batch = fptt_jax.Batch(x, np.zeros_like(x), mask=~late)
  state, _ = trainer.step(trainer.init(jax.random.key(0), batch), batch)
  np.testing.assert_allclose(state.hidden[1], state.params['s'], rtol=1e-6)
  assert np.abs(state.hidden[0] - state.params['s']).max() > 0.01
  begun, _ = trainer.step(state, batch._replace(mask=late))
  # By hand: the row starts from s, with its gradient.
  changes = np.abs(begun.params['s'] - state.params['s'])
  carried = state._replace(hidden=state.hidden + 1e-3)
  cut, _ = trainer.step(carried, batch._replace(mask=late))
  assert (changes > 1.2 * np.abs(cut.params['s'] - state.params['s'])).all()
