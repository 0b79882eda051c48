"""Public functions, layers, batches and flags on random valid and invalid arguments.

Hypothesis draws valid arguments, and for half of the calls it replaces one of them with
an invalid one: a number out of range, an unknown option, another shape or dtype. A
valid call must work. An invalid one must raise a ValueError or TypeError that names the
argument. Hardly anything is compiled: models and steps are traced on shapes. The suite
runs a fixed share; `-m slow` runs more.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple
import warnings

from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import add_task, images, language_model
import fptt_jax
from fptt_jax import losses, nn

KEY = jax.random.key(0)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)
FLOAT32_MAX = float(np.finfo(np.float32).max)


def share_and_study(share: int, study: int) -> Any:
  """Parametrize by the number of examples."""
  return pytest.mark.parametrize(
    'examples',
    [
      pytest.param(share, id='share'),
      pytest.param(study, id='study', marks=pytest.mark.slow),
    ],
  )


def run_examples(strategy: st.SearchStrategy[Any], test: Any, examples: int) -> None:
  """Call `test` on a reproducible number of examples."""
  fixed = settings(
    max_examples=examples,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
  )
  fixed(given(strategy)(test))()


def assert_names(name: str, call: Callable[[], Any]) -> None:
  """Assert that a call raises an error that names the argument."""
  with pytest.raises((ValueError, TypeError)) as error:
    call()
  assert re.search(rf'\b{name}\b', str(error.value)), f'{name!r} not in {error.value!r}'


class Argument(NamedTuple):
  """Valid and invalid values of an argument."""

  good: st.SearchStrategy[Any]
  bad: st.SearchStrategy[Any]


# Numbers, options and dtypes.


def number(low: float, high: float = FLOAT32_MAX) -> Argument:
  """Return real numbers in [low, high], with its ends, and others."""
  good = st.sampled_from([low, high]) | st.floats(low, high)
  kinds = st.sampled_from([float, np.float64, np.asarray])
  below = math.nextafter(low, -math.inf) if low < 1 else low - 1
  outside = [below, math.nan, math.inf, -math.inf, -FLOAT32_MAX * 1.1, 'many']
  if high < FLOAT32_MAX:
    outside.append(math.nextafter(high, math.inf))
  return Argument(
    st.builds(lambda kind, value: kind(value), kinds, good), st.sampled_from(outside)
  )


def integer(low: int, high: int | None = None, tried: int = 5) -> Argument:
  """Return integers in [low, high], of which small ones are tried, and others."""
  good = st.integers(low, tried if high is None else min(tried, high))
  kinds = st.sampled_from([int, np.int64, np.uint8, np.asarray])
  outside: list[Any] = [low - 1, low + 0.5, -(2**31), math.nan, 2**31, '3']
  if high is not None:
    outside.append(high + 1)
  return Argument(
    st.builds(lambda kind, value: kind(value), kinds, good), st.sampled_from(outside)
  )


def choice(*names: str) -> Argument:
  """Return the names of options, and other texts."""
  others = st.text(max_size=8).filter(lambda text: text not in names)
  return Argument(st.sampled_from(names), others)


def optional(argument: Argument) -> Argument:
  """Return an argument that may be None."""
  return argument._replace(good=st.none() | argument.good)


POSITIVE = number(FLOAT32_TINY)
NON_NEGATIVE = number(0.0)
FINITE = number(-FLOAT32_MAX)
UNIT = number(0.0, 1.0)
BETA = number(FLOAT32_TINY, 1.0)
RATE = number(0.0, math.nextafter(1.0, 0.0))
SIZE = integer(1)
DTYPE = Argument(
  st.sampled_from([jnp.float32, 'float32', np.dtype(np.float16), jnp.bfloat16]),
  st.sampled_from(['int32', 'complex64', 'float64', np.float64, 'float8_e4m3fn']),
)

HYPERPARAMETERS = {
  'alpha': POSITIVE,
  'beta': BETA,
  'kappa': NON_NEGATIVE,
  'linear_scale': UNIT,
}
ESTIMATES = choice('running', 'recomputed', 'lagged')


def make_fptt(**arguments: Any) -> None:
  """Trace an update of an FPTT optimizer."""
  tx = fptt_jax.fptt(optax.sgd(0.1), **arguments)
  params = {'w': jnp.ones(3), 'b': jnp.ones((), jnp.bfloat16)}

  def update() -> Any:
    return tx.update(params, tx.init(params), params, grad_fn=lambda p: p)

  updates, _ = jax.eval_shape(update)
  assert updates['w'].shape == (3,)
  assert updates['b'].dtype == jnp.bfloat16


def make_loss(make: Callable[..., losses.Loss], **arguments: Any) -> None:
  """Trace the state of a loss."""
  loss = make(**arguments)
  jax.eval_shape(lambda: loss.init(3))


FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Argument]]] = {
  'spectral_radius': (
    fptt_jax.spectral_radius,
    HYPERPARAMETERS
    | {
      # A product of numbers near the limits would overflow.
      'lr': number(FLOAT32_TINY)._replace(good=st.floats(1e-6, 1e3)),
      'alpha': POSITIVE._replace(good=st.floats(1e-6, 1e3)),
      'kappa': NON_NEGATIVE._replace(good=st.floats(0, 1e3)),
      'momentum': RATE,
      'curvature': FINITE._replace(good=st.floats(-1e3, 1e3)),
    },
  ),
  'fptt': (
    make_fptt,
    HYPERPARAMETERS | {'gradient_estimate': ESTIMATES, 'state_dtype': DTYPE},
  ),
  'num_windows': (
    functools.partial(fptt_jax.make_windows, 100),
    {'num_windows': integer(1, 100)},
  ),
  'window_size': (
    functools.partial(fptt_jax.make_windows, 100),
    {'window_size': integer(1, 100)},
  ),
  'terminal_classification': (
    functools.partial(make_loss, losses.terminal_classification),
    {
      'num_classes': integer(2),
      'divergence': choice('class_ema', 'last_epoch', 'uniform', 'none'),
      'ema_decay': RATE,
    },
  ),
  'examples': (
    functools.partial(make_loss, functools.partial(losses.terminal_classification, 3)),
    {
      'divergence': choice('example')._replace(bad=st.just('uniform')),
      'num_examples': SIZE._replace(bad=st.sampled_from([0, -1, 1.5, None])),
    },
  ),
  'sequence_classification': (
    functools.partial(make_loss, losses.sequence_classification),
    {'num_classes': integer(2)},
  ),
}


@st.composite
def calls(draw: st.DrawFn, table: dict[str, Any]) -> Any:
  """Draw (function, arguments, name of the invalid argument or None)."""
  function, kinds = table[draw(st.sampled_from(list(table)))]
  arguments = {name: draw(kind.good) for name, kind in kinds.items()}
  wrong = draw(st.none() | st.sampled_from(list(kinds)))
  if wrong is not None:
    arguments[wrong] = draw(kinds[wrong].bad)
  return function, arguments, wrong


def check_call(case: Any) -> None:
  """Assert that a valid call works and an invalid one names its argument."""
  function, arguments, wrong = case
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='fptt with beta=')
    if wrong is None:
      function(**arguments)
    else:
      assert_names(wrong, lambda: function(**arguments))


@share_and_study(250, 5000)
def test_functions(examples):
  """Functions of numbers, options and dtypes."""
  run_examples(calls(FUNCTIONS), check_call, examples)


# Layers.

# Within the range of every dtype, float16 included.
SMALL = FINITE._replace(good=st.floats(-9, 9))
SMALL_POSITIVE = Argument(st.floats(0.1, 9), st.sampled_from([-1.0, math.nan, 'many']))
SIZES = {'in_features': SIZE, 'hidden_features': SIZE, 'param_dtype': DTYPE}
LAYERS: dict[str, dict[str, Argument]] = {
  'LSTM': SIZES | {'init': choice('torch', 'flax'), 'forget_bias': SMALL},
  'GRU': SIZES | {'init': choice('torch', 'flax')},
  'ElmanRNN': SIZES | {'init': choice('torch', 'flax')},
  'AntisymmetricRNN': SIZES
  | {'epsilon': SMALL_POSITIVE, 'gamma': SMALL_POSITIVE, 'w_scale': SMALL_POSITIVE},
  'FastGRNN': SIZES | {'zeta': SMALL, 'nu': SMALL},
  'IncrementalRNN': SIZES | {'inner_steps': integer(1, 100), 'eta': SMALL_POSITIVE},
  'IndRNN': SIZES | {'max_weight': optional(SMALL_POSITIVE)},
  'LRU': SIZES | {'state_features': optional(SIZE)},
}


def run_window(name: str, **arguments: Any) -> None:
  """Trace a window of training through a layer."""

  def run() -> Any:
    layer = getattr(nn, name)(**arguments, rngs=nnx.Rngs(0))
    x = jnp.zeros((3, 2, int(arguments['in_features'])))
    _, y = layer(layer.initial_state(2), x, jnp.ones((3, 2), bool), KEY)
    return y

  assert jax.eval_shape(run).shape[:2] == (3, 2)


@share_and_study(60, 3000)
def test_layers(examples):
  """Constructors of recurrent layers; a layer that can be made runs a window."""
  table = {
    name: (functools.partial(run_window, name), kinds) for name, kinds in LAYERS.items()
  }
  run_examples(calls(table), check_call, examples)


# Shapes and dtypes of arrays.

T, B, C = 6, 2, 3


class Task(NamedTuple):
  """A loss with its number of outputs, its good targets and their name in errors."""

  loss: losses.Loss
  outputs: int
  targets: np.ndarray
  name: str


TASKS = [
  Task(losses.terminal_regression(), 1, np.zeros(B, np.float32), 'targets'),
  Task(losses.terminal_classification(C), C, np.zeros(B, np.int32), 'labels|targets'),
  Task(losses.sequence_classification(C), C, np.zeros((T, B), np.int32), 'targets'),
  Task(losses.sequence_regression(), 1, np.zeros((T, B, 1), np.float32), 'targets'),
]


@functools.cache
def trainer_of(number: int) -> fptt_jax.Trainer:
  """Return a trainer of a task."""
  task = TASKS[number]
  model = nn.from_nnx(lambda rngs: nn.ElmanRNN(2, task.outputs, rngs=rngs))
  return fptt_jax.make_trainer(
    model, task.loss, optax.sgd(0.1), method='tbptt', num_windows=2
  )


def good_batch(number: int) -> fptt_jax.Batch:
  return fptt_jax.Batch(
    np.zeros((T, B, 2), np.float32),
    TASKS[number].targets,
    np.full(B, T, np.int32),
    np.ones((T, B), bool),
  )


def other_arrays(array: np.ndarray) -> st.SearchStrategy[np.ndarray]:
  """Return arrays of another shape, or of a dtype that no field accepts."""
  shapes = [
    (*array.shape[:-1], array.shape[-1] + 1),
    (*array.shape, 1),
    array.shape[1:],
  ]
  # A row of targets [B] can be of shape [B, 1], and [T, B] can gain an axis O.
  wider = [shape for shape in shapes[:1] + shapes[2:] if shape != ()]
  return st.sampled_from(
    [
      *(np.zeros(shape, array.dtype) for shape in wider),
      array.astype(np.complex64),
    ]
  )


@st.composite
def batches(draw: st.DrawFn) -> Any:
  """Draw (task number, batch, name of the invalid field or None)."""
  number = draw(st.integers(0, len(TASKS) - 1))
  batch = good_batch(number)
  for field in draw(st.lists(st.sampled_from(['lengths', 'mask']), max_size=2)):
    batch = batch._replace(**{field: None})
  wrong = draw(st.none() | st.sampled_from(batch._fields))
  if wrong is not None:
    array = getattr(good_batch(number), wrong)
    bad = other_arrays(array)
    if wrong == 'lengths':
      bad |= st.sampled_from([np.array([T, 0]), np.array([T, T + 1]), np.ones(B)])
    if wrong == 'targets' and array.dtype == np.int32:
      bad |= st.sampled_from([np.full_like(array, -1), np.full_like(array, C)])
    batch = batch._replace(**{wrong: draw(bad)})
  return number, batch, wrong


def check_batch(case: Any) -> None:
  """Assert that a valid batch trains, and that an invalid one's field is named."""
  number, batch, wrong = case
  trainer = trainer_of(number)
  if wrong is None:
    fptt_jax.validate_batch(batch, TASKS[number].loss)
    state = jax.eval_shape(trainer.init, KEY, batch)
    after, _ = jax.eval_shape(trainer.step, state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    return
  # Wrong inputs may show first where their steps or sequences are counted.
  names = {'targets': TASKS[number].name, 'inputs': 'inputs|targets|lengths|mask'}
  state = jax.eval_shape(trainer.init, KEY, good_batch(number))

  named = f'(?:{names.get(wrong, wrong)})'

  def step() -> None:
    jax.eval_shape(trainer.step, state, batch)

  def init_and_step() -> None:
    trainer.init(KEY, batch)
    step()

  assert_names(named, init_and_step)
  # A traced step by itself sees no values, only shapes and dtypes.
  field, good = getattr(batch, wrong), getattr(good_batch(number), wrong)
  if (field.shape, field.dtype.kind) != (good.shape, good.dtype.kind):
    assert_names(named, step)


@share_and_study(60, 3000)
def test_batches(examples):
  """Batches of each loss, with lengths and masks."""
  run_examples(batches(), check_batch, examples)


@pytest.mark.parametrize(
  'x',
  [np.zeros((3, 2)), np.zeros((3, 2, 4)), np.zeros((3, 1, 2))],
)
@pytest.mark.parametrize('name', LAYERS)
def test_inputs_of_layers(name, x):
  """Inputs of another shape raise an error that names them."""
  layer = getattr(nn, name)(2, 3, rngs=nnx.Rngs(0))
  mask = jnp.ones((3, 2), bool)
  assert_names(
    'inputs|batch|mask',
    lambda: layer(layer.initial_state(2), jnp.asarray(x), mask, KEY),
  )


# Flags.


def flags() -> list[Any]:
  """Return (Config, flag, invalid value) of the flags with a number or an option."""
  cases = []
  for script in (add_task, images, language_model):
    for field in dataclasses.fields(script.Config):
      if field.metadata['choices'] and isinstance(field.default, str):
        cases.append((script.Config, field.name, 'unknown'))
      elif isinstance(field.default, float):
        cases.append((script.Config, field.name, math.nan))
      elif isinstance(field.default, int) and not isinstance(field.default, bool):
        cases += [(script.Config, field.name, value) for value in (-(2**31), 2**31)]
  return cases


@pytest.mark.parametrize(
  ('config', 'flag', 'value'),
  flags(),
  ids=lambda x: x.__module__ if isinstance(x, type) else str(x),
)
def test_flags(config, flag, value):
  """A flag out of range raises an error that begins with its name."""
  with pytest.raises(ValueError, match=rf'^--{flag}\b'):
    config(**{flag: value})


@pytest.mark.parametrize('value', [1e39, -1e39, 3.5e38, 1e-46, (1e-3, 1e39), 10**400])
def test_flags_that_float32_does_not_hold(value):
  """A number of 64 bits that float32 would round to infinity or 0 raises an error."""
  with pytest.raises(ValueError, match='--lr must be a number that float32 holds, got'):
    add_task.Config(lr=value)
