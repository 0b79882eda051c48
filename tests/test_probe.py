"""Models that windows would change raise errors when they are made or see a first
batch.
"""

from typing import Any

from flax import linen, nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import nn
from fptt_jax._probe import check_model

D, H, B, T = 4, 5, 3, 6
KEY = jax.random.key(0)


def stack_of(make: Any) -> fptt_jax.Model:
  return nn.from_nnx(lambda rngs: nn.Sequential(nn.LSTM(1, D, rngs=rngs), make(rngs)))


class Attention(nnx.Module):
  """Attends over the axis that it takes for time, without a mask."""

  def __init__(self, rngs: nnx.Rngs):
    self.query = nnx.Linear(D, D, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    scores = jnp.einsum('sbd,tbd->bst', self.query(x), x)
    return jnp.einsum('bst,tbd->sbd', jax.nn.softmax(scores), x)


class Inside(nnx.Module):
  """Runs a recurrent layer that starts anew in each window."""

  def __init__(self, rngs: nnx.Rngs):
    self.layer = nn.GRU(D, D, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.layer(self.layer.initial_state(x.shape[1]), x)[1]


class Remembering(nnx.Module):
  """Keeps its last output as an attribute that appears with the first call."""

  def __call__(self, x: jax.Array) -> jax.Array:
    before = getattr(self, 'before', jnp.zeros_like(x[0]))
    self.before = nnx.data(x[-1])
    return x + before[None]


class Overwriting(nnx.Module):
  """Keeps its last output as an attribute it is made with."""

  def __init__(self) -> None:
    self.calls = jnp.zeros(())

  def __call__(self, x: jax.Array) -> jax.Array:
    self.calls = self.calls + 1
    return x * self.calls


class SpectralScale(nnx.Module):
  """Writes into its own parameter."""

  def __init__(self) -> None:
    self.scale = nnx.Param(jnp.ones(()))

  def __call__(self, x: jax.Array) -> jax.Array:
    self.scale[...] = self.scale[...] * 0.5
    return x * self.scale[...]


class Cached(nnx.Module):
  """Keeps a cache in a variable of its own kind."""

  def __init__(self) -> None:
    self.cache = nnx.Cache(jnp.zeros(D))

  def __call__(self, x: jax.Array) -> jax.Array:
    return x + self.cache[None, None]


def bidirectional(rngs: nnx.Rngs) -> nnx.Bidirectional:
  first, second = (nnx.RNN(nnx.GRUCell(D, D, rngs=rngs)) for _ in range(2))
  return nnx.Bidirectional(first, second)


def decoding(rngs: nnx.Rngs) -> nnx.MultiHeadAttention:
  attention = nnx.MultiHeadAttention(2, D, decode=True, rngs=rngs)
  attention.init_cache((T, B, D))
  return attention


REFUSED = {
  'nnx.Bidirectional': bidirectional,
  'nnx.RNN backward': lambda rngs: nnx.RNN(nnx.GRUCell(D, D, rngs=rngs), reverse=True),
  'nnx.Conv': lambda rngs: nnx.Conv(D, D, kernel_size=(3,), rngs=rngs),
  'nnx.MultiHeadAttention': lambda rngs: nnx.MultiHeadAttention(
    2, D, decode=False, rngs=rngs
  ),
  'nnx.MultiHeadAttention with cache': decoding,
  'nnx.GroupNorm': lambda rngs: nnx.GroupNorm(D, num_groups=2, rngs=rngs),
  'nnx.InstanceNorm': lambda rngs: nnx.InstanceNorm(D, rngs=rngs),
  'nnx.LayerNorm over rows': lambda rngs: nnx.LayerNorm(
    D, reduction_axes=(1, 2), rngs=rngs
  ),
  'nnx.BatchNorm': lambda rngs: nnx.BatchNorm(D, rngs=rngs),
  'nnx.Sequential around nnx.Conv': lambda rngs: nnx.Sequential(
    jnp.tanh, nnx.Conv(D, D, kernel_size=(1, 2), rngs=rngs)
  ),
  'flipped in time': lambda rngs: lambda x: jnp.flip(x, 0),
  'flipped rows': lambda rngs: lambda x: jnp.flip(x, 1),
  'earlier rows': lambda rngs: lambda x: x + jnp.cumsum(x[:, ::-1], 1)[:, ::-1],
  'shifted in time': lambda rngs: lambda x: jnp.roll(x, 1, 0),
  'rolled rows': lambda rngs: lambda x: jnp.roll(x, 1, 1),
  'mean over time': lambda rngs: lambda x: x - x.mean(0, keepdims=True),
  'mean over rows': lambda rngs: lambda x: x - x.mean(1, keepdims=True),
  'softmax over rows': lambda rngs: lambda x: jax.nn.softmax(x, axis=1),
  'sum over time': lambda rngs: lambda x: jnp.cumsum(x, 0),
  'attention': Attention,
  'recurrent layer inside': Inside,
  'attribute as memory': lambda rngs: Remembering(),
  'attribute as counter': lambda rngs: Overwriting(),
  'parameter as memory': lambda rngs: SpectralScale(),
  'cache': lambda rngs: Cached(),
}


MESSAGES = {
  'forward cell': ('nnx.Bidirectional', 'nnx.RNN backward'),
  'looks ahead': (
    'flipped in time',
    'shifted in time',
    'mean over time',
    'attention',
  ),
  'restarts in each window': ('sum over time', 'recurrent layer inside'),
  'must be nnx.Param': ('nnx.MultiHeadAttention with cache', 'nnx.BatchNorm', 'cache'),
  'writes to': ('attribute as memory', 'attribute as counter', 'parameter as memory'),
}
"""Parts of the errors that do not say that the layer mixes the rows."""


@pytest.mark.parametrize('name', REFUSED)
def test_layers_that_windows_would_change_are_refused(name: str) -> None:
  """The layer's name does not matter, and the error says what is wrong with it."""
  special = [message for message, names in MESSAGES.items() if name in names]
  [message] = special or ['mixes the rows']
  with pytest.raises(TypeError, match=message):
    stack_of(REFUSED[name])


def test_the_error_names_the_layer() -> None:
  """Of two layers, the error names the unknown one."""
  with pytest.raises(TypeError, match=r'layers\[1\] Conv.*rows'):
    stack_of(REFUSED['nnx.Conv'])


ACCEPTED = {
  'nnx.LayerNorm': lambda rngs: nnx.LayerNorm(D, rngs=rngs),
  'nnx.RMSNorm': lambda rngs: nnx.RMSNorm(D, rngs=rngs),
  'nnx.Sequential': lambda rngs: nnx.Sequential(
    nnx.Linear(D, D, rngs=rngs), jax.nn.relu, nnx.LayerNorm(D, rngs=rngs)
  ),
  'nnx.Conv of size 1': lambda rngs: nnx.Conv(D, D, kernel_size=(1,), rngs=rngs),
  'nnx.Dropout inside': lambda rngs: nnx.Sequential(
    nnx.Dropout(0.5, rngs=rngs), nnx.Linear(D, 2, rngs=rngs)
  ),
  'residual function': lambda rngs: lambda x: x + jnp.tanh(x),
  'per-step cell': lambda rngs: nnx.GRUCell(D, H, rngs=rngs),
}


@pytest.mark.parametrize('name', ACCEPTED)
def test_layers_of_one_step_are_taken(name: str) -> None:
  """The probe accepts all of them."""
  stack_of(ACCEPTED[name])


@pytest.mark.parametrize(
  'options', [{}, {'time_major': True, 'unroll': 2}, {'return_carry': True}]
)
def test_rnn_is_its_cell_with_the_state_carried(options: dict[str, Any]) -> None:
  """Over windows of a sequence, in a stack or alone, it equals flax's own loop over the
  whole sequence.
  """

  def cell(rngs):
    return nnx.GRUCell(D, H, rngs=rngs)

  alone = nn.from_nnx(lambda rngs: nnx.RNN(cell(rngs), **options))
  params, x = alone.init(KEY), jax.random.normal(KEY, (T, B, D))
  expected = nnx.RNN(cell(nnx.Rngs(KEY)), time_major=True)(x)
  state, first = alone.apply(params, alone.initial_state(B), x[:2], None, None)
  _, second = alone.apply(params, state, x[2:], None, None)
  np.testing.assert_allclose(jnp.concatenate([first, second]), expected, atol=1e-6)
  stacked = nn.from_nnx(lambda rngs: nn.Sequential(nnx.RNN(cell(rngs), **options)))
  _, y = stacked.apply(stacked.init(KEY), stacked.initial_state(B), x, None, None)
  np.testing.assert_allclose(y, expected, atol=1e-6)


def test_a_stack_without_state_warns() -> None:
  """The warning says that nothing is remembered."""
  with pytest.warns(UserWarning, match='Sequential carries no hidden state'):
    nn.from_nnx(lambda rngs: nn.Sequential(nnx.Linear(D, D, rngs=rngs)))


# The trainer.


def own(apply: Any, initial_state: Any = None) -> fptt_jax.Model:
  """Return a handmade model: a running sum of the inputs, which `apply` may break."""
  return fptt_jax.Model(
    init=lambda key: jnp.ones(()),
    initial_state=initial_state or (lambda batch_size: jnp.zeros((batch_size, D))),
    apply=apply,
  )


def running_sum(
  params: Any, state: Any, x: jax.Array, mask: Any, key: Any
) -> tuple[Any, jax.Array]:
  y = state[None] + params * jnp.cumsum(x, 0)
  return y[-1], y


def mixing(
  params: Any, state: Any, x: jax.Array, mask: Any, key: Any
) -> tuple[Any, jax.Array]:
  return running_sum(params, state, x - x.mean(1, keepdims=True), mask, key)


def ahead(
  params: Any, state: Any, x: jax.Array, mask: Any, key: Any
) -> tuple[Any, jax.Array]:
  return running_sum(params, state, x[::-1], mask, key)


def restarting(
  params: Any, state: Any, x: jax.Array, mask: Any, key: Any
) -> tuple[Any, jax.Array]:
  return running_sum(params, jnp.zeros_like(state), x, mask, key)


def train_once(model: fptt_jax.Model) -> fptt_jax.TrainState:
  trainer = fptt_jax.make_trainer(
    model,
    fptt_jax.losses.terminal_regression(),
    optax.sgd(0.1),
    method='tbptt',
    num_windows=2,
  )
  return trainer.init(KEY, fptt_jax.Batch(jnp.ones((T, B, D)), jnp.ones((B, D))))


@pytest.mark.parametrize(
  ('apply', 'what'),
  [(mixing, 'rows'), (ahead, 'looks ahead'), (restarting, 'restarts')],
)
def test_own_models_are_refused_by_the_trainer(apply: Any, what: str) -> None:
  """The trainer's init probes handmade models."""
  with pytest.raises(TypeError, match=what):
    train_once(own(apply))


def test_own_models_are_taken_by_the_trainer() -> None:
  """A correct model is probed once: another probe would call it again."""
  calls = []

  def counted(*args: Any) -> tuple[Any, jax.Array]:
    calls.append(1)
    return running_sum(*args)

  model = own(counted)
  train_once(model)
  probed = len(calls)
  assert probed > 0
  train_once(model)
  assert len(calls) == probed


def test_a_first_layer_that_tells_no_features_is_probed_by_the_trainer() -> None:
  """The batch's shape gives the features."""
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(
      lambda x: x[:, ::-1],
      lambda x: x[..., :2],
      nnx.Conv(2, D, (3,), rngs=rngs),
      jnp.tanh,
      Own(rngs),
    )
  )
  with pytest.raises(TypeError, match='rows'):
    train_once(model)


class Own(nnx.Module):
  """A user's layer that runs windows and has no in_features."""

  def __init__(self, rngs: nnx.Rngs):
    self.layer = nn.ElmanRNN(D, D, rngs=rngs)

  def initial_state(self, batch_size: int) -> Any:
    return self.layer.initial_state(batch_size)

  def __call__(self, state: Any, x: Any, mask: Any = None, key: Any = None) -> Any:
    return self.layer(state, x, mask, key)


def test_traced_parameters_are_not_probed() -> None:
  """Members of a population are made under vmap, where values are not available."""
  jax.eval_shape(
    lambda params: check_model(
      own(mixing), params, jax.ShapeDtypeStruct((T, B, D), jnp.float32)
    ),
    jnp.ones(()),
  )


# Leaves of the hidden state without rows.


class CountingCell(nnx.Module):
  """Carries a scalar in addition to its rows."""

  def __init__(self, make: Any):
    self.in_features = D
    self.make = make

  def __call__(self, carry: Any, x: jax.Array) -> Any:
    return carry, x

  def initialize_carry(self, shape: Any, rngs: Any) -> Any:
    return {'h': jnp.zeros(shape), 'extra': self.make(shape)}


class LinenCountingCell(linen.Module):
  """The same cell in Linen."""

  make: Any

  @linen.compact
  def __call__(self, carry: Any, x: jax.Array) -> Any:
    return carry, linen.Dense(2)(x)

  def initialize_carry(self, key: Any, shape: Any) -> Any:
    return {'h': jnp.zeros(shape), 'extra': self.make(shape)}


EXTRAS = {
  'counter': lambda shape: jnp.zeros((), jnp.int32),
  'scalar': lambda shape: jnp.ones(()),
  'key': lambda shape: jax.random.key(0),
  'features alone': lambda shape: jnp.zeros(shape[-1] + 10),
  'features first': lambda shape: jnp.zeros((shape[-1] + 10, shape[0])),
}


@pytest.mark.parametrize('name', EXTRAS)
def test_state_without_rows_is_refused(name: str) -> None:
  """NNX cells, Linen cells and handmade models raise an error that names the leaf."""
  with pytest.raises(TypeError, match='extra'):
    nn.from_nnx(lambda rngs: CountingCell(EXTRAS[name]))
  with pytest.raises(TypeError, match='extra'):
    nn.from_linen(LinenCountingCell(EXTRAS[name]), (D,))
  with pytest.raises(TypeError, match='extra'):
    train_once(
      own(
        running_sum,
        lambda batch_size: {
          'h': jnp.zeros((batch_size, D)),
          'extra': EXTRAS[name]((batch_size, D)),
        },
      )
    )


class RowCounter(linen.Module):
  """Counts steps in each row of its carry."""

  @linen.compact
  def __call__(self, carry: Any, x: jax.Array) -> Any:
    h, count = carry
    h = jnp.tanh(linen.Dense(D)(jnp.concatenate([h, x], -1)))
    return (h, count + 1), linen.Dense(2)(h) + count[:, None]

  def initialize_carry(self, key: Any, shape: Any) -> Any:
    return jnp.zeros((shape[0], D)), jnp.zeros(shape[0], jnp.int32)


@pytest.mark.parametrize('steps', [6, 5])
def test_counters_with_rows_are_trained(steps: int) -> None:
  """In windows of different sizes and ragged batches, counters count the
  valid steps.
  """
  model = nn.from_linen(RowCounter(), (1,))
  loss = fptt_jax.losses.terminal_classification(2)
  trainer = fptt_jax.make_trainer(
    model, loss, fptt_jax.fptt(optax.sgd(0.1)), num_windows=2
  )
  batch = fptt_jax.Batch(
    jnp.ones((steps, 2, 1)), jnp.zeros(2, jnp.int32), jnp.array([steps, 3])
  )
  state, metrics = trainer.step(trainer.init(KEY, batch), batch)
  assert np.isfinite(metrics.loss).all()
  np.testing.assert_array_equal(state.hidden[1], [steps, 3])


def test_a_refused_model_is_refused_again() -> None:
  """Not taken for one that has passed."""
  model = helpers.elman()
  mixing = model._replace(
    apply=lambda params, h, x, mask, key: model.apply(
      params, h, x - x.mean(1, keepdims=True), mask, key
    )
  )
  batch = helpers.series_batch(4, 3)
  loss = fptt_jax.losses.sequence_regression()
  trainer = helpers.quick_trainer(mixing, loss, optax.sgd(0.1), method='bptt')
  for _ in range(2):
    with pytest.raises(TypeError, match='mixes the rows'):
      trainer.init(jax.random.key(0), batch)
