"""Each public function and each flag does what it is asked or refuses it in words of
ours, whatever it is given.

Hypothesis draws arguments of which most mean something and up to two are odd. A call
must come to something that runs, or end in a ValueError or TypeError that one of our
own `raise` statements raised; what surely means nothing must be refused. Hardly
anything is
compiled: models, steps and optimizers are run on shapes alone. The suite runs a share,
  the same every time; `-m slow` runs more.
"""

import ast
from collections import Counter
from collections.abc import Callable, Sequence
import dataclasses
import fractions
import functools
import math
from pathlib import Path
import traceback
from typing import Any, NamedTuple
import warnings

from flax import linen, nnx
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import add_task, images, language_model
from experiments.benchmark import cases
from experiments.benchmark.settings import Config as BenchmarkConfig
from experiments.core import flags, optimizers, recipe
from experiments.data.__main__ import Config as DataConfig
from experiments.paper.settings import Config as PaperConfig
import fptt_jax
from fptt_jax import losses, nn

OURS = [Path(module.__file__).parent for module in (fptt_jax, flags)]
KEY = jax.random.key(0)
share_and_study = lambda share, study: pytest.mark.parametrize(
  'examples',
  [
    pytest.param(share, id='share'),
    pytest.param(study, id='study', marks=pytest.mark.slow),
  ],
)


@pytest.fixture(autouse=True)
def whole_tracebacks():
  """JAX's frames are not left out: they are what is looked for."""
  before = jax.config.jax_traceback_filtering
  jax.config.update('jax_traceback_filtering', 'off')
  yield
  jax.config.update('jax_traceback_filtering', before)


@functools.cache
def raising_lines(file: str) -> frozenset[int]:
  """The lines of a file's `raise` statements."""
  statements = (
    node
    for node in ast.walk(ast.parse(Path(file).read_text()))
    if isinstance(node, ast.Raise)
  )
  return frozenset(
    line
    for node in statements
    for line in range(node.lineno, (node.end_lineno or 0) + 1)
  )


def is_ours(error: Exception, start: str = '') -> bool:
  """Whether a `raise` of ours raised it, its text begins as it should and says what it
  got.
  """
  last = traceback.extract_tb(error.__traceback__)[-1]
  own = any(folder in Path(last.filename).parents for folder in OURS)
  kind = (
    isinstance(error, ValueError | TypeError)
    and str(error).startswith(start)
    and 'got' in str(error)
  )
  return own and kind and last.lineno in raising_lines(last.filename)


def attempt(
  function: Callable[..., Any], *args: Any, start: str = ''
) -> tuple[bool, Any]:
  """(True, what it returns), or (False, None) if it is refused in words of ours."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='fptt with beta=|FPTT with SGD')
    try:
      return True, function(*args)
    except (ValueError, TypeError) as error:
      if not is_ours(error, start):
        raise AssertionError(
          f'not in words of ours: {type(error).__name__}: {error}'
        ) from error
      return False, None


def fuzz(
  cases: st.SearchStrategy[Any], accepts: Callable[[Any], bool], examples: int
) -> None:
  """Runs `accepts` (case) -> whether it was accepted, on so many cases; of both kinds
  there must be some.
  """
  seen: Counter[bool] = Counter()

  @settings(
    max_examples=examples,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
  )
  @given(cases)
  def run(case):
    seen[accepts(case)] += 1

  run()
  print(f'{seen.total()} cases: {seen[True]} accepted, {seen[False]} refused')
  assert min(seen[True], seen[False]) > 0


@pytest.mark.parametrize(
  ('call', 'ours'),
  [
    (lambda: fptt_jax.make_windows(0), True),
    (
      lambda: fptt_jax.WindowPlan(1, None, None).num_windows,
      False,
    ),  # Python's TypeError, on a line of ours.
    (lambda: jnp.ones(2) @ jnp.ones(3), False),
  ],
)
def test_whose_words_they_are(call, ours):
  """The innermost line must be a `raise` of ours."""
  with pytest.raises((ValueError, TypeError)) as caught:
    call()
  assert is_ours(caught.value) == ours


# Values, and what means something as what.


class Made(NamedTuple):
  """What is made where it is needed: Flax's modules belong to the trace that makes
  them.
  """

  make: Callable[[], Any]
  what: str

  def __repr__(self) -> str:
    return self.what


def made(source: str) -> Made:
  return Made(
    lambda: eval(
      source, {'jax': jax, 'jnp': jnp, 'linen': linen, 'nn': nn, 'nnx': nnx}
    ),
    source,
  )


def unwrapped(value: Any) -> Any:
  """The thing itself, inside of lists and keywords too."""
  if isinstance(value, Made):
    return value.make()
  if isinstance(value, list):
    return [unwrapped(item) for item in value]
  return (
    {name: unwrapped(item) for name, item in value.items()}
    if isinstance(value, dict)
    else value
  )


def nonsense(*args: Any, **kwargs: Any) -> str:
  """Takes anything."""
  return 'nonsense'


class Odd:
  """An object that knows nothing, not even how to be compared."""

  def __init__(self, *args: Any, **kwargs: Any):
    pass

  def __eq__(self, other: object) -> bool:
    raise AssertionError('compared')

  __hash__ = object.__hash__


ODD = st.one_of(
  st.sampled_from(
    [
      None,
      True,
      False,
      np.True_,
      -1,
      0,
      2.5,
      0.5,
      math.nan,
      math.inf,
      -math.inf,
      1e39,
      1e-50,
      10**400,
      2**31,
      -(2**63),
      1j,
    ]
  ),
  st.sampled_from(
    [
      '',
      'x',
      '3',
      '1.5',
      'torch',
      'float32',
      'int32',
      b'1',
      bytearray(b'1'),
      fractions.Fraction(1, 2),
      range(3),
    ]
  ),
  st.sampled_from([(), (1,), [], [1], [[1], [1, 2]], {}, {'a': 1}, {1}, {'count': 1}]),
  st.sampled_from(
    [Odd(), Odd, nonsense, object(), jnp, jax.ShapeDtypeStruct((2,), jnp.float32)]
  ),
  st.sampled_from(
    [
      np.float32(math.nan),
      np.datetime64('2020-01-01'),
      np.timedelta64(1, 's'),
      np.array('a'),
      np.array(None, object),
    ]
  ),
  st.sampled_from(
    [
      np.ones(1),
      np.ones(2),
      np.ones((2, 2)),
      np.ones(0),
      jnp.ones(1),
      jnp.ones(3),
      jnp.array(True),
      KEY,
    ]
  ),
  st.integers(),
  st.floats(),
  st.text(max_size=4),
)


def mostly(
  good: st.SearchStrategy[Any], odd: st.SearchStrategy[Any] = ODD, times: int = 9
) -> st.SearchStrategy[Any]:
  """So many times out of ten a good one."""
  return st.integers(0, 9).flatmap(lambda chance: good if chance < times else odd)


class Kind(NamedTuple):
  """What an argument is.

  Attributes:
    good: values that mean something.
    may: whether one of `ODD` may mean something as well.
    bad: more values that mean nothing.
  """

  good: st.SearchStrategy[Any]
  may: Callable[[Any], bool] = lambda value: False
  bad: tuple[Any, ...] = ()


def is_real(value: Any) -> bool:
  return isinstance(value, int | float | np.number) and not isinstance(
    value, bool | np.complexfloating | np.timedelta64
  )


def number(low: float, high: float = float(np.finfo(np.float32).max)) -> Kind:
  middle = 0.5 if low < 0.5 < high else (low + high) / 2
  given = [
    low,
    high,
    middle,
    np.float32(middle),
    np.float64(middle),
    np.array(middle),
    jnp.asarray(middle),
  ]
  return Kind(
    st.sampled_from(given), lambda value: is_real(value) and low <= value <= high
  )


def whole(low: int, high: int) -> Kind:
  """Integers of which `high` is the greatest tried, not the greatest there may be."""
  given = [
    low,
    high,
    np.int64(low),
    np.uint8(high),
    float(low),
    np.array(low),
    jnp.asarray(high),
  ]
  return Kind(
    st.sampled_from(given),
    lambda value: (
      is_real(value) and low <= value < 2**31 and value == math.floor(value)
    ),
  )


def choice(*names: Any) -> Kind:
  return Kind(
    st.sampled_from(names),
    lambda value: isinstance(value, str | bool | np.bool_) and value in names,
  )


def optional(kind: Kind) -> Kind:
  return kind._replace(
    good=st.none() | kind.good, may=lambda value: value is None or kind.may(value)
  )


def things(good: list[str], bad: Sequence[str] = ()) -> Kind:
  return Kind(
    st.sampled_from([made(source) for source in good]),
    bad=tuple(made(source) for source in bad),
  )


FLOAT32_TINY = float(np.finfo(np.float32).tiny)
SIZE = whole(1, 5)
POSITIVE, NON_NEGATIVE, FINITE = (
  number(FLOAT32_TINY),
  number(0.0),
  number(-float(np.finfo(np.float32).max)),
)
RATE = number(0.0, math.nextafter(1.0, 0.0))
FLAG = Kind(
  st.sampled_from([True, False, np.True_, np.False_]),
  lambda value: isinstance(value, bool | np.bool_),
)
DTYPE = Kind(
  st.sampled_from([jnp.float32, 'float32', np.dtype(np.float16), jnp.bfloat16, float]),
  lambda value: isinstance(value, str | np.floating),
  (
    'int32',
    'complex64',
    'float64',
    np.float64,
    'float8_e4m3fn',
    'float4_e2m1fn',
    bool,
    'f4,f4',
    {'names': 1},
    'U1',
  ),
)
RNGS = things(
  ['nnx.Rngs(0)', 'nnx.Rngs(params=1)', 'nnx.Rngs(jax.random.key(0))'],
  ['nnx.Rngs(dropout=0)', 'jax.random.key(0)'],
)
EMBED = things(
  ['nnx.Embed(5, 4, rngs=nnx.Rngs(0))'],
  ['nnx.Linear(5, 4, rngs=nnx.Rngs(0))', 'nnx.Embed'],
)
CALLABLE = Kind(st.sampled_from([lambda *args: jnp.float32(0)]), callable)


@st.composite
def calls(
  draw: st.DrawFn,
  kinds: dict[str, Kind],
  fitting: st.SearchStrategy[dict[str, Any]] | None = None,
) -> Any:
  """(arguments, whether one of them surely means nothing); up to two are odd. `fitting`
  are some that go with each other.
  """
  odd = draw(st.lists(st.sampled_from(list(kinds)), max_size=2, unique=True))
  if fitting is not None:
    kinds = kinds | {
      name: kinds[name]._replace(good=st.just(value))
      for name, value in draw(fitting).items()
    }
  arguments, meaningless = {}, False
  for name, kind in kinds.items():
    if name not in odd:
      arguments[name] = draw(kind.good)
      continue
    choices = ODD.map(lambda value, kind=kind: (value, not kind.may(value)))
    if kind.bad:
      choices |= st.sampled_from(kind.bad).map(lambda value: (value, True))
    arguments[name], sure = draw(choices)
    meaningless |= sure
  return arguments, meaningless


@st.composite
def of_table(draw: st.DrawFn, table: dict[str, Any]) -> Any:
  """(name, (arguments, whether one of them means nothing)) of one of several
  functions.
  """
  name = draw(st.sampled_from(list(table)))
  return name, draw(calls(table[name]))


def accepted(
  call: tuple[dict[str, Any], bool],
  function: Callable[..., Any],
  abstract: bool = False,
) -> tuple[bool, Any]:
  """`attempt` of it, on shapes alone if it is to be abstract; it must be refused if an
  argument means nothing.
  """
  arguments, meaningless = call
  run = lambda: function(**unwrapped(arguments))
  done, result = attempt(jax.eval_shape, run) if abstract else attempt(run)
  assert not (done and meaningless), 'accepted what means nothing'
  return done, result


DTYPES = [
  np.float32,
  np.float64,
  np.float16,
  jnp.bfloat16,
  np.int32,
  np.int64,
  np.int8,
  np.uint8,
  np.bool_,
  np.complex64,
]
STRANGE_DTYPES = [object, 'U1', 'M8[s]', jnp.float8_e4m3fn, jnp.int4]


@st.composite
def arrays(
  draw: st.DrawFn, shapes: st.SearchStrategy[Any] | None = None, strange: bool = True
) -> Any:
  """Arrays of all shapes and dtypes, of one value, NumPy's, JAX's or abstract."""
  shape = draw(
    st.lists(st.integers(0, 4), max_size=4).map(tuple) if shapes is None else shapes
  )
  dtype = draw(
    st.sampled_from([*DTYPES, *DTYPES, *STRANGE_DTYPES] if strange else DTYPES)
  )
  value = draw(st.sampled_from([0, 1, 1, 2, -1, 100, math.nan, math.inf]))
  with np.errstate(invalid='ignore'), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    array = (
      np.zeros(shape, dtype)
      if dtype in STRANGE_DTYPES
      else np.full(shape, value).astype(dtype)
    )
  if dtype in STRANGE_DTYPES[:3]:
    return array
  return draw(
    st.sampled_from(
      [
        lambda: array,
        lambda: jnp.asarray(array),
        lambda: jax.eval_shape(jnp.asarray, array),
      ]
    )
  )()


def traceable(tree: Any) -> bool:
  """Whether compiled functions take it at all: what else there is JAX itself refuses at
  their door.
  """
  leaves = jax.tree.leaves(tree)
  try:
    jax.eval_shape(lambda *leaves: 0, *leaves)
  except (TypeError, OverflowError):
    return False
  return True


# Layers.

SIZES = dict(in_features=SIZE, hidden_features=SIZE)
FUSED = dict(implementation=choice('custom_vjp', 'scan'), param_dtype=DTYPE, rngs=RNGS)
INIT = dict(init=choice('torch', 'flax'))
LAYERS: dict[str, dict[str, Kind]] = {
  'LSTM': SIZES | INIT | dict(forget_bias=optional(FINITE)) | FUSED,
  'GRU': SIZES | INIT | dict(recurrent_bias=FLAG) | FUSED,
  'RNN': SIZES | INIT | FUSED,
  'AntisymmetricRNN': SIZES
  | dict(epsilon=POSITIVE, gamma=NON_NEGATIVE, w_scale=NON_NEGATIVE)
  | FUSED,
  'FastGRNN': SIZES
  | dict(
    w_rank=optional(SIZE),
    u_rank=optional(SIZE),
    zeta=FINITE,
    nu=FINITE,
    param_dtype=DTYPE,
    rngs=RNGS,
  ),
  'IncrementalRNN': SIZES
  | dict(
    inner_steps=whole(1, 100),
    eta=POSITIVE,
    u_rank=optional(SIZE),
    param_dtype=DTYPE,
    rngs=RNGS,
  ),
  'IndRNN': SIZES
  | dict(
    max_weight=optional(POSITIVE),
    initial_range=Kind(
      st.sampled_from([(0, 1), (-0.5, np.float32(0.5)), [0.0, 0.0]]),
      bad=((1, 0), (0, math.nan), ('0', '1')),
    ),
  )
  | FUSED,
  'LRU': SIZES
  | dict(
    state_features=optional(SIZE),
    r_min=number(0, 0.9),
    r_max=number(0.5, 1),
    max_phase=number(FLOAT32_TINY, 2 * math.pi),
  )
  | FUSED,
  'LockedDropout': dict(rate=RATE),
  'EmbeddingDropout': dict(embed=EMBED, rate=RATE),
  'WeightDrop': dict(
    layer=things(
      ['nn.GRU(2, 3, rngs=nnx.Rngs(0))', 'nn.LSTM(2, 3, rngs=nnx.Rngs(0))'],
      ['nn.LSTM', 'nn.LRU(2, 3, rngs=nnx.Rngs(0))', 'nn'],
    ),
    rate=RATE,
  ),
  'ActivationPenalty': dict(alpha=NON_NEGATIVE),
  'TemporalActivationPenalty': dict(beta=NON_NEGATIVE),
  'TiedReadout': dict(embed=EMBED),
  'MixtureOfSoftmaxes': dict(
    in_features=SIZE, embed=EMBED, experts=SIZE, dropout=RATE, rngs=RNGS
  ),
  'FromCell': dict(
    cell=things(
      ['nnx.GRUCell(2, 3, rngs=nnx.Rngs(0))', 'nnx.SimpleCell(2, 3, rngs=nnx.Rngs(0))'],
      ['nnx.GRUCell', 'nnx.Linear(2, 3, rngs=nnx.Rngs(0))', 'linen.GRUCell(3)'],
    )
  ),
  'Reconstruction': dict(
    layer=things(
      ['nn.ElmanRNN(2, 3, rngs=nnx.Rngs(0))', 'nnx.GRUCell(2, 3, rngs=nnx.Rngs(0))'],
      ['nnx.Linear(2, 3, rngs=nnx.Rngs(0))', 'nn.ElmanRNN', 'nn.LockedDropout'],
    ),
    in_features=Kind(st.just(2), lambda value: is_real(value) and value == 2, (3, 2.5)),
    segment=whole(2, 3),
    anchors=whole(1, 2),
    weight=NON_NEGATIVE,
    rngs=RNGS,
  ),
}


def input_features(name: str, arguments: dict[str, Any]) -> int:
  """D of the inputs that a layer of these arguments takes."""
  if name == 'TiedReadout':
    return 4
  return int(arguments.get('in_features', 2))


def run_window(layer: Any, x: Any) -> Any:
  """A window of training through a layer."""
  if not hasattr(layer, 'initial_state'):
    return layer(x)
  state = layer.initial_state(x.shape[1])
  end, y = layer(state, x, jnp.ones(x.shape[:2], bool), KEY)
  assert jax.tree.map(jnp.shape, end) == jax.tree.map(jnp.shape, state)
  return y.outputs if isinstance(y, fptt_jax.OutputsWithPenalty) else y


@share_and_study(100, 4000)
def test_layers(examples):
  """A layer that can be made runs a window."""

  def accepts(case):
    name, call = case

    def run(**arguments):
      layer = getattr(nn, name)(**arguments)
      x = (
        jnp.zeros((3, 2), jnp.int32)
        if name == 'EmbeddingDropout'
        else jnp.zeros((3, 2, input_features(name, arguments)))
      )
      return run_window(layer, x)

    done, y = accepted(call, run, abstract=True)
    assert not done or y.shape[:2] == (3, 2)
    return done

  fuzz(of_table(LAYERS), accepts, examples)


PARTS = things(
  [
    'nn.LSTM(2, 2, rngs=nnx.Rngs(0))',
    'nn.LRU(2, 2, rngs=nnx.Rngs(0))',
    'nnx.SimpleCell(2, 2, rngs=nnx.Rngs(0))',
    'nnx.Linear(2, 2, rngs=nnx.Rngs(0))',
    'nn.WeightDrop(nn.ElmanRNN(2, 2, rngs=nnx.Rngs(0)), 0.5)',
    'nn.Reconstruction(nn.ElmanRNN(2, 2, rngs=nnx.Rngs(0)), 2, segment=2, '
    'rngs=nnx.Rngs(0))',
    'nn.LockedDropout(0.5)',
    'nn.ActivationPenalty(1.0)',
    'nnx.Dropout(0.5)',
    'jnp.tanh',
  ],
  ['nn.LSTM', 'nnx.Linear', '[jnp.tanh]'],
)


@st.composite
def stacks(draw: st.DrawFn) -> tuple[list[Any], bool]:
  """(layers of a stack, whether one of them means nothing)."""
  layers = draw(st.lists(PARTS.good, max_size=3))
  odd = draw(st.integers(0, 1))
  if odd:
    layers.insert(
      draw(st.integers(0, len(layers))),
      draw(st.sampled_from(PARTS.bad) | ODD.filter(lambda value: not callable(value))),
    )
  return layers, bool(odd) or not layers


@share_and_study(25, 1000)
def test_stacks_and_models_of_them(examples):
  """A stack that can be made is a model whose window runs, in training and in
  evaluation.
  """

  def accepts(case):
    layers, meaningless = case

    def run():
      model = nn.from_nnx(lambda rngs: nn.Sequential(*unwrapped(layers)))
      return [window_of(model, key) for key in (None, KEY)]

    done, outputs = attempt(run)
    assert not (done and meaningless)
    assert not done or [y.shape for y in outputs] == [(3, 2, 2)] * 2
    return done

  fuzz(stacks(), accepts, examples)


def window_of(model: fptt_jax.Model, key: Any, features: int = 2) -> Any:
  """The outputs of a window of a model, abstract."""

  def run():
    x, mask = jnp.zeros((3, 2, features)), jnp.ones((3, 2), bool)
    _, y = model.apply(model.init(KEY), model.initial_state(2), x, mask, key)
    return y.outputs if isinstance(y, fptt_jax.OutputsWithPenalty) else y

  return jax.eval_shape(run)


ADAPTERS = {
  'from_nnx': dict(
    build=Kind(
      st.sampled_from(
        [
          lambda rngs: nn.ElmanRNN(2, 2, rngs=rngs),
          lambda rngs: nnx.GRUCell(2, 2, rngs=rngs),
        ]
      ),
      bad=(
        lambda rngs: 3,
        lambda rngs: nn.ElmanRNN,
        lambda rngs: None,
        lambda rngs: nnx.Linear(2, 2, rngs=rngs),
        lambda rngs: nn.Sequential(
          nn.ElmanRNN(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
        ),
        made('nn.ElmanRNN(2, 2, rngs=nnx.Rngs(0))'),
      ),
    )
  ),
  'from_linen': dict(
    module=things(
      ['linen.GRUCell(2)', 'linen.OptimizedLSTMCell(2)'],
      ['linen.GRUCell', 'linen.Dense(2)', 'nnx.RNN'],
    ),
    features_shape=Kind(
      st.sampled_from([(2,), [2], (np.int64(2),)]),
      lambda value: isinstance(value, tuple | list),
      ((0,), (2.5,), (-1,), (None,), 'x', 2),
    ),
    dtype=DTYPE._replace(bad=DTYPE.bad[1:]),  # Tokens are inputs, too.
  ),
}


@share_and_study(40, 1000)
def test_adapters(examples):
  """What they make of a module runs a window."""

  def accepts(case):
    name, (arguments, meaningless) = case
    features = arguments.get('features_shape', (2,))
    assume(
      not isinstance(features, tuple) or features
    )  # () is for tokens, which these modules do not take.
    run = lambda **arguments: window_of(
      getattr(nn, name)(**arguments), KEY, int(features[-1])
    )
    done, y = accepted((arguments, meaningless), run)
    assert not done or y.shape == (3, 2, 2)
    return done

  fuzz(of_table(ADAPTERS), accepts, examples)


@st.composite
def state_dicts(draw: st.DrawFn) -> Any:
  """Weights by torch's names, good ones or up to two of them changed."""
  gates, hidden, features = (
    draw(st.sampled_from([1, 3, 4])),
    draw(st.integers(1, 3)),
    draw(st.integers(1, 3)),
  )
  weights: dict[Any, Any] = {}
  for layer in range(draw(st.integers(1, 2))):
    shapes = {
      'weight_ih': (gates * hidden, features if layer == 0 else hidden),
      'weight_hh': (gates * hidden, hidden),
    }
    if draw(st.booleans()):
      shapes |= {'bias_ih': (gates * hidden,), 'bias_hh': (gates * hidden,)}
    weights |= {
      f'{name}_l{layer}': np.ones(shape, np.float32) for name, shape in shapes.items()
    }
  for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
    name = draw(
      st.sampled_from(list(weights))
      | st.sampled_from(['kernel', 'weight_ih_l7', 'weight_hr_l0', 3, None])
    )
    what = draw(st.sampled_from(['gone', 'odd', 'any', 'same shape']))
    if what == 'gone':
      weights.pop(name, None)
    elif what == 'odd':
      weights[name] = draw(ODD)
    else:
      weights[name] = draw(
        arrays(st.just(np.shape(weights.get(name))) if what == 'same shape' else None)
      )
  return draw(mostly(st.just(weights)))


@share_and_study(50, 2500)
def test_weights_of_torch(examples):
  """Weights that are taken are those of a layer here: it runs with them."""

  def accepts(weights):
    done, found = attempt(nn.from_torch, weights)
    for params in found or []:
      features, width = params['w_x'].shape
      hidden = params['w_h'].shape[0]
      layer = {1: nn.ElmanRNN, 3: nn.GRU, 4: nn.LSTM}[width // hidden]
      model = nn.from_nnx(
        lambda rngs, layer=layer, sizes=(features, hidden): layer(*sizes, rngs=rngs)
      )
      run = lambda params, model=model, features=features: model.apply(
        params, model.initial_state(2), jnp.zeros((3, 2, features)), None, None
      )[1]
      assert jax.eval_shape(run, params).shape == (3, 2, hidden)
    return done

  fuzz(state_dicts(), accepts, examples)


def concrete(tree: Any) -> Any:
  return jax.tree.map(
    lambda x: (
      jnp.asarray(np.zeros(x.shape, x.dtype))
      if isinstance(x, jax.ShapeDtypeStruct)
      else x
    ),
    tree,
  )


@st.composite
def window_calls(draw: st.DrawFn) -> dict[str, Any]:
  """What a model's window is given; one of it may be odd."""
  given = dict(
    state=lambda model: model.initial_state(2),
    x=draw(arrays(st.just((3, 2, 2)), strange=False)),
    mask=draw(st.sampled_from([None, np.ones((3, 2), bool)])),
  )
  for name in draw(st.lists(st.sampled_from(list(given)), max_size=1)):
    odd = draw(
      ODD | arrays() | arrays(st.sampled_from([(3, 2, 3), (3, 2), (2, 3), (2, 2)]))
    )
    given[name] = (lambda model, odd=odd: odd) if name == 'state' else odd
  return given


@share_and_study(40, 1500)
def test_windows_of_layers(examples):
  """Every recurrent layer's window, on a state, inputs and a mask that fit or not;
  batch sizes as well.
  """
  layers = [
    getattr(nn, name)
    for name in (
      'LSTM',
      'GRU',
      'RNN',
      'AntisymmetricRNN',
      'FastGRNN',
      'IncrementalRNN',
      'IndRNN',
      'LRU',
    )
  ]
  models = [
    nn.from_nnx(lambda rngs, layer=layer: layer(2, 3, rngs=rngs)) for layer in layers
  ]
  params = [jax.eval_shape(model.init, KEY) for model in models]

  def accepts(case):
    number, given, batch_size = case
    model = models[number]
    sized, state = attempt(jax.eval_shape, lambda: model.initial_state(batch_size))
    assert not sized or {leaf.shape[0] for leaf in jax.tree.leaves(state)} == {
      int(batch_size)
    }
    state, x, mask = (
      given['state'](model),
      concrete(given['x']),
      concrete(given['mask']),
    )
    done, y = attempt(
      jax.eval_shape,
      lambda params: model.apply(params, state, x, mask, None)[1],
      params[number],
    )
    assert not done or y.shape == (3, 2, 3)
    return done

  fuzz(
    st.tuples(st.integers(0, len(layers) - 1), window_calls(), SIZE.good | ODD),
    accepts,
    examples,
  )


# The transformation.

SCHEDULES = (
  lambda count: 0.5,
  lambda count: jnp.asarray(0.25),
  optax.constant_schedule(0.5),
)
BAD_SCHEDULES = (
  lambda count: math.nan,
  lambda count: -1.0,
  lambda count: jnp.ones(2),
  lambda count: None,
)


def hyperparameter(kind: Kind) -> Kind:
  return kind._replace(good=kind.good | st.sampled_from(SCHEDULES), bad=BAD_SCHEDULES)


OPTIMIZER = Kind(
  st.sampled_from(
    [
      optax.sgd(0.1),
      optax.adam(1e-3),
      optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    ]
  ),
  bad=(optax.adam, (optax.sgd(0.1),), 1e-3),
)
FPTT = dict(
  base_optimizer=OPTIMIZER,
  alpha=hyperparameter(POSITIVE),
  beta=hyperparameter(number(FLOAT32_TINY, 1.0)),
  kappa=hyperparameter(NON_NEGATIVE),
  rho=hyperparameter(number(0.0, 1.0)),
  correction=choice('eq6', 'eq4'),
  gradient_estimate=choice('running', 'recomputed', 'lagged'),
  inner_steps=whole(1, 3),
  state_dtype=optional(DTYPE),
)


@share_and_study(60, 2500)
def test_transformation(examples):
  """What is accepted makes updates of the parameters' shapes and dtypes."""
  params = {'w': jnp.ones(3), 'b': jnp.ones((), jnp.bfloat16)}
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)

  def accepts(call):
    def run(**arguments):
      tx = fptt_jax.fptt(**arguments)
      state = tx.init(params)
      updates, after = jax.eval_shape(
        lambda params, state: tx.update(params, state, params, grad_fn=lambda p: p),
        params,
        state,
      )
      assert kinds(updates) == kinds(params)
      assert kinds(after) == kinds(state)

    return accepted(call, run)[0]

  fuzz(calls(FPTT), accepts, examples)


def trees(strange: bool) -> st.SearchStrategy[Any]:
  some = st.sampled_from(
    [np.ones(2, np.float32), np.ones(2), jnp.ones(2, jnp.bfloat16)]
  )
  leaves = (
    some | some | arrays(st.sampled_from([(2,), (2,), (3,), (2, 2), ()]), strange)
  )
  return st.one_of(
    st.fixed_dictionaries({'w': some}),
    st.fixed_dictionaries({'w': leaves, 'b': leaves}),
    st.tuples(some, leaves),
    st.just((None,)),
  )


@share_and_study(60, 2500)
def test_trees_given_to_an_optimiser(examples):
  """Parameters, gradients and states that fit each other or do not, given to `init`,
  `update`, and what reads the state.
  """
  same, odd = st.just('same'), ODD.filter(lambda value: not isinstance(value, float))
  cases = st.tuples(
    mostly(trees(False), odd), *(mostly(same, trees(True) | odd) for _ in range(3))
  )
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)

  def accepts(case):
    params, grads, other_params, other_state = case
    tx = fptt_jax.fptt(optax.sgd(0.1), alpha=0.5)
    done, state = attempt(jax.eval_shape, lambda: tx.init(concrete(params)))
    if not done:
      return False
    pick = lambda other, usual: (
      usual if isinstance(other, str) and other == 'same' else other
    )
    grads, state, params = (
      concrete(tree)
      for tree in (
        pick(grads, params),
        pick(other_state, state),
        pick(other_params, params),
      )
    )
    updated, result = attempt(jax.eval_shape, lambda: tx.update(grads, state, params))
    assert not updated or shapes(result[0]) == shapes(params)
    read, w_bar = attempt(
      jax.eval_shape, lambda: fptt_jax.fptt_eval_params(state, params)
    )
    assert not read or shapes(w_bar) == shapes(params)
    assert (
      attempt(jax.eval_shape, lambda: fptt_jax.fptt_restart(state, params))[0] == read
    )
    return updated and read

  fuzz(cases, accepts, examples)


# The trainer.

T, B, C = 6, 2, 3
LOSSES = {
  'terminal_regression': (
    losses.terminal_regression(),
    1,
    jax.ShapeDtypeStruct((B,), jnp.float32),
  ),
  'terminal_classification': (
    losses.terminal_classification(C),
    C,
    jax.ShapeDtypeStruct((B,), jnp.int32),
  ),
  'example': (
    losses.terminal_classification(C, divergence='example', num_examples=4),
    C,
    (jax.ShapeDtypeStruct((B,), jnp.int32),) * 2,
  ),
  'sequence_classification': (
    losses.sequence_classification(C, accuracy=True),
    C,
    jax.ShapeDtypeStruct((T, B), jnp.int32),
  ),
  'sequence_regression': (
    losses.sequence_regression(),
    1,
    jax.ShapeDtypeStruct((T, B, 1), jnp.float32),
  ),
}


@functools.cache
def small_model(outputs: int) -> fptt_jax.Model:
  """D = 2, H = 2; its readout is a layer of ours, which says itself what it cannot
  read.
  """
  return nn.from_nnx(
    lambda rngs: nn.Sequential(
      nn.ElmanRNN(2, 2, rngs=rngs), nn.ElmanRNN(2, outputs, rngs=rngs)
    )
  )


def good_batch(loss: str) -> fptt_jax.Batch:
  targets = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), LOSSES[loss][2])
  return fptt_jax.Batch(np.zeros((T, B, 2), np.float32), targets)


TRAINER = dict(
  model=Kind(
    st.just(small_model(1)),
    bad=(small_model, fptt_jax.Model(None, None, None), tuple(small_model(1))),
  ),
  loss=Kind(
    st.just(losses.terminal_regression()),
    bad=(losses.terminal_regression, fptt_jax.Loss(None, None, None)),
  ),
  optimizer=OPTIMIZER,
  method=Kind(
    st.sampled_from(
      [
        *fptt_jax.METHODS,
        fptt_jax.METHODS['tbptt'],
        fptt_jax.Method(False, True, False, num_windows=2),
      ]
    ),
    lambda value: isinstance(value, str) and value in fptt_jax.METHODS,
    (
      fptt_jax.Method(False, True, False, num_windows=2.5),
      fptt_jax.Method(False, True, False, num_windows=np.ones(2)),
      fptt_jax.Method('yes', True, False),
      (False, True, False, None, False, ''),
    ),
  ),
  num_windows=optional(whole(1, 3)),
  window_size=Kind(
    st.sampled_from([None, None, 2]),
    lambda value: value is None or whole(1, 2).may(value),
    (0,),
  ),
  carry_hidden=FLAG,
  loss_weights=Kind(
    st.sampled_from([None, None, None, [1.0, 2.0], np.ones(2), (0, 1, 2)]),
    lambda value: (
      value is None or isinstance(value, tuple | list | range | np.ndarray | jax.Array)
    ),
    ('12', [math.nan, 1.0], [[1.0]], [None], [1, 'x'], [1j], [1e300]),
  ),
  inner_steps=whole(1, 2),
  truncation_steps=optional(whole(2, 3)),
  skip_nonfinite=FLAG,
  shard_params=FLAG,
  readout_chunk=Kind(
    st.sampled_from([None, None, None, 2]),
    lambda value: value is None or whole(1, 2).may(value),
    (0, 2.5),
  ),
  mesh=Kind(
    st.sampled_from([None, jax.sharding.Mesh(jax.devices()[:2], ('devices',))]),
    lambda value: value is None,
    (
      jax.devices(),
      jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('a', 'b')),
      2,
    ),
  ),
)

PLAIN, REGULARISED = optax.sgd(0.1), fptt_jax.fptt(optax.sgd(0.1))
UNTOLD: dict[str, Any] = dict(
  num_windows=None, window_size=None, loss_weights=None, truncation_steps=None
)
FITTING = [
  UNTOLD | dict(method='fptt', optimizer=REGULARISED, inner_steps=1),
  UNTOLD
  | dict(
    method='tbptt',
    optimizer=optax.MultiSteps(PLAIN, 2),
    num_windows=np.int64(2),
    loss_weights=[1, 2.0],
  ),
  UNTOLD | dict(method='bptt', optimizer=PLAIN),
  UNTOLD | dict(method='ogd', optimizer=PLAIN, inner_steps=2.0),
  UNTOLD | dict(method='bptt_aux', optimizer=PLAIN, window_size=2.0),
  UNTOLD | dict(method='tbptt_final', optimizer=PLAIN, truncation_steps=np.uint8(2)),
  UNTOLD | dict(method='ftrl', optimizer=PLAIN, num_windows=3),
  UNTOLD
  | dict(method=fptt_jax.Method(False, True, False, num_windows=2), optimizer=PLAIN),
]


@share_and_study(40, 2000)
def test_trainer(examples):
  """A trainer that can be made and started takes steps and evaluates, and its state
  keeps its shapes.
  """
  batch = good_batch('terminal_regression')
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)

  def accepts(call):
    def run(**arguments):
      trainer = fptt_jax.make_trainer(**arguments)
      state = trainer.init(KEY, batch)
      after, _ = jax.eval_shape(trainer.step, state, batch)
      assert shapes(after) == shapes(state)
      jax.eval_shape(trainer.evaluate, state.params, batch)
      jax.eval_shape(trainer.end_epoch, state)

    return accepted(call, run)[0]

  fuzz(calls(TRAINER, st.sampled_from(FITTING)), accepts, examples)


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, Any, Any]:
  """(loss, key, batch): a good batch of it, or up to two of its parts odd, or all of
  it.
  """
  loss = draw(st.sampled_from(list(LOSSES)))
  steps, rows = draw(
    st.sampled_from([(T, B)] * 6 + [(T, 3), (1, 1), (4, B), (0, 1), (3, 0)])
  )
  targets = jax.tree.map(
    lambda leaf: np.zeros(
      [{T: steps, B: rows}.get(n, n) for n in leaf.shape], leaf.dtype
    ),
    LOSSES[loss][2],
  )
  batch = fptt_jax.Batch(np.zeros((steps, rows, 2), np.float32), targets)
  if draw(st.booleans()):
    kind = draw(st.sampled_from([np.int32, np.uint8, np.int64]))
    batch = batch._replace(
      lengths=np.full(
        rows, draw(st.sampled_from([steps, 1, steps, 1, 0, steps + 1])), kind
      )
    )
  near = st.sampled_from(
    [
      (steps, rows, 2),
      (steps, rows, 1),
      (steps, rows),
      (rows,),
      (steps,),
      (rows, 1),
      (steps, rows, 2, 1),
    ]
  )
  for name in draw(
    mostly(
      st.just([]),
      st.lists(st.sampled_from(fptt_jax.Batch._fields), min_size=1, max_size=2),
      6,
    )
  ):
    batch = batch._replace(
      **{
        name: draw(
          arrays(near) | arrays() | ODD | st.tuples(arrays(near), arrays(near))
        )
      }
    )
  return loss, draw(mostly(st.just(KEY))), draw(mostly(st.just(batch)))


@share_and_study(50, 3000)
def test_batches(examples):
  """A batch that `init` takes both trains and evaluates, or does neither;
  `validate_batch` takes it or refuses it in words of ours.
  """
  trainers = {
    name: fptt_jax.make_trainer(
      small_model(outputs), loss, optax.sgd(0.1), method='tbptt', num_windows=2
    )
    for name, (loss, outputs, _) in LOSSES.items()
  }
  states = {
    name: trainer.init(KEY, good_batch(name)) for name, trainer in trainers.items()
  }

  def accepts(case):
    name, key, batch = case
    trainer = trainers[name]
    started, _ = attempt(trainer.init, key, batch)
    attempt(fptt_jax.validate_batch, batch, LOSSES[name][0])
    if not traceable(batch):
      assert not started
      return False
    stepped, _ = attempt(jax.eval_shape, trainer.step, states[name], batch)
    evaluated, _ = attempt(jax.eval_shape, trainer.evaluate, states[name].params, batch)
    assert not started or stepped == evaluated
    return started and stepped

  fuzz(batches(), accepts, examples)


@share_and_study(50, 1500)
def test_states_and_losses_of_another_kind(examples):
  """A step is given any state, `evaluate` any parameters and hidden state,
  `validate_batch` any loss.
  """
  trainer = fptt_jax.make_trainer(
    small_model(1),
    losses.terminal_regression(),
    optax.adam(0.1),
    method='tbptt',
    num_windows=2,
  )
  other = fptt_jax.make_trainer(
    small_model(3),
    losses.terminal_classification(3),
    optax.sgd(0.1),
    method='tbptt',
    num_windows=2,
  )
  batch = good_batch('terminal_regression')
  good, bad = (
    trainer.init(KEY, batch),
    other.init(KEY, good_batch('terminal_classification')),
  )
  changes = st.dictionaries(
    st.sampled_from(good._fields), st.just('other') | ODD | trees(True), max_size=1
  )

  def accepts(case):
    change, hidden, loss = case
    change = {
      name: getattr(bad, name) if isinstance(value, str) and value == 'other' else value
      for name, value in change.items()
    }
    state = good._replace(**change)
    attempt(fptt_jax.validate_batch, batch, loss)
    if not traceable((state, hidden)):
      return False
    stepped, _ = attempt(jax.eval_shape, trainer.step, state, batch)
    evaluated, _ = attempt(
      jax.eval_shape, trainer.evaluate, state.params, batch, hidden
    )
    return stepped and evaluated

  fuzz(st.tuples(changes, mostly(st.none(), ODD | trees(True)), ODD), accepts, examples)


# Programs.

ONE = fptt_jax.make_trainer(
  small_model(1),
  losses.terminal_regression(),
  optax.sgd(0.1),
  method='tbptt',
  num_windows=2,
)
TRAINERS = Kind(st.just(ONE), bad=(ONE.step, tuple(ONE), fptt_jax.make_trainer))
PROGRAMS = {
  'scan_steps': dict(
    trainer=TRAINERS, read=Kind(st.just(lambda source, item: item), callable)
  ),
  'population': dict(trainer=TRAINERS, own_batches=FLAG, mesh=TRAINER['mesh']),
}
GOOD_BATCH = good_batch('terminal_regression')


def stacked(size: int) -> fptt_jax.Batch:
  return jax.tree.map(
    lambda leaf: np.broadcast_to(leaf, (size, *leaf.shape)), GOOD_BATCH
  )


@share_and_study(40, 1500)
def test_programs(examples):
  """What is given to them, and to what they make: keys, items and batches of one
  number, of several or of none.
  """
  keys = st.sampled_from(
    [KEY, *(jax.random.split(KEY, number) for number in (0, 1, 2, 2, 2, 3))]
  )
  lone = (
    GOOD_BATCH,
    *(stacked(number) for number in (0, 1, 2, 2, 2, 3)),
    fptt_jax.Batch(np.ones((2, T, B, 2)), np.ones(3)),
  )
  state = ONE.init(KEY, GOOD_BATCH)

  def accepts(case):
    (name, call), keys, given = case
    done, result = accepted(call, getattr(fptt_jax, name))
    if not done or call[0].get('read') in (nonsense, Odd):
      return done
    if name == 'scan_steps':
      if not traceable(given):
        return False
      done, value = attempt(jax.eval_shape, result, state, (), given)
      assert not done or value[1].loss.shape == (len(given.inputs), 2)
      return done
    done, states = attempt(result.init, keys, given)
    if not done:
      return False
    _, metrics = jax.eval_shape(result.step, states, given)
    assert metrics.loss.shape == (len(keys), 2)
    for batch in (GOOD_BATCH, stacked(2), lone[-1]):
      attempt(jax.eval_shape, result.step, states, batch)
      attempt(jax.eval_shape, result.evaluate, states.params, batch)
    return True

  fuzz(
    st.tuples(of_table(PROGRAMS), mostly(keys), mostly(st.sampled_from(lone))),
    accepts,
    examples,
  )


# Functions that are run as they are.


def check_radius(radius: float) -> None:
  assert isinstance(radius, float)
  assert radius >= 0


def check_cut(windows: fptt_jax.WindowPlan) -> None:
  """The windows cover all steps."""
  assert windows.starts[0] == 0
  np.testing.assert_array_equal(windows.starts[1:], windows.ends[:-1])
  assert 1 <= windows.size == (windows.ends - windows.starts).max()


def check_means(found: dict[Any, Any]) -> None:
  assert all(isinstance(value, float | np.ndarray) for value in found.values())


def check_loss(loss: fptt_jax.Loss) -> None:
  jax.eval_shape(lambda: loss.init(3))


def check_found(found: str | None) -> None:
  assert found is None or 'loss is nan in window 1 of 2' in found


def check_flag(flag: bool) -> None:
  assert isinstance(flag, bool)


def check_global_batch(batch: fptt_jax.Batch) -> None:
  assert batch.inputs.sharding.spec == jax.sharding.PartitionSpec(None, 'devices')


def numbers(good: list[Any], ndim: int) -> Kind:
  """Real numbers with so many axes, three along the first."""
  odd = (
    [1.0, 'x', 2.0],
    [[1.0], [1.0, 2.0], [1.0]],
    np.ones((3, 1, 1)),
    np.ones(3, bool),
    np.ones(3, complex),
  )
  return Kind(
    st.sampled_from(
      [good, np.array(good), jnp.array(good), np.array(good, np.float16)]
    ),
    lambda value: True,
    odd,
  )


SEEN = fptt_jax.StepMetrics(
  np.array([1.0, math.nan]),
  np.ones(2),
  {},
  skipped=np.zeros(2, bool),
  lambda_norm=np.ones([]),
)
METRICS = Kind(
  st.sampled_from(
    [SEEN, SEEN._replace(skipped=np.ones(2, bool)), jax.tree.map(jnp.asarray, SEEN)]
  ),
  bad=(
    tuple(SEEN),
    SEEN._replace(loss=1.0),
    SEEN._replace(loss=np.array(['a', 'b'])),
    SEEN._replace(skipped=None),
    SEEN._replace(grad_norm=np.ones(3)),
    SEEN._replace(lambda_norm=np.ones(2)),
    jax.tree.map(lambda leaf: leaf[None, None], SEEN),
  ),
)


FUNCTIONS: dict[
  str, tuple[Callable[..., Any], dict[str, Kind], Callable[[Any], Any]]
] = {
  'spectral_radius': (
    fptt_jax.spectral_radius,
    dict(
      lr=POSITIVE,
      alpha=POSITIVE,
      kappa=NON_NEGATIVE,
      beta=number(FLOAT32_TINY, 1.0),
      rho=number(0.0, 1.0),
      correction=choice('eq6', 'eq4'),
      momentum=RATE,
      curvature=FINITE,
    ),
    check_radius,
  ),
  'cut': (
    fptt_jax.make_windows,
    dict(
      num_steps=whole(1, 200),
      num_windows=optional(whole(1, 5)),
      window_size=optional(whole(1, 5)),
    ),
    check_cut,
  ),
  'use_cpu_devices': (
    fptt_jax.use_cpu_devices,
    dict(num_devices=optional(whole(1, 8))),
    lambda result: None,
  ),
  'terminal_classification': (
    losses.terminal_classification,
    dict(
      num_classes=whole(2, 5),
      divergence=choice(*losses.DIVERGENCES),
      ema_decay=RATE,
      num_examples=optional(SIZE),
    ),
    check_loss,
  ),
  'sequence_classification': (
    losses.sequence_classification,
    dict(num_classes=whole(2, 5), accuracy=FLAG),
    check_loss,
  ),
  'from_function': (
    losses.from_function,
    dict(function=CALLABLE, measure=optional(CALLABLE), terminal=optional(FLAG)),
    check_loss,
  ),
  'means': (
    fptt_jax.compute_metrics,
    dict(
      totals=Kind(
        st.sampled_from(
          [{'count': 2, 'loss': jnp.float32(3)}, {'count': jnp.int32(0), 'loss': 0.0}]
        ),
        lambda value: isinstance(value, dict) and 'count' in value,
        (
          {'loss': 1.0},
          {'count': jnp.ones(2)},
          {'count': 1, 'loss': 'x'},
          {'count': 1, 'loss': jnp.ones(2)},
          {'count': None},
        ),
      )
    ),
    check_means,
  ),
  'find_nonfinite': (
    fptt_jax.find_nonfinite,
    dict(metrics=METRICS, first_update=whole(0, 5), radius=optional(NON_NEGATIVE)),
    check_found,
  ),
  'lambda_diverges': (
    fptt_jax.lambda_diverges,
    dict(
      lambda_norms=numbers([0.1, 0.2, 90.0], 1),
      grad_norms=numbers([[1.0, 2.0], [1.0, 2.0], [math.inf, 1.0]], 2),
    ),
    check_flag,
  ),
  'make_global_batch': (
    fptt_jax.make_global_batch,
    dict(
      batch=Kind(
        st.sampled_from([GOOD_BATCH, GOOD_BATCH._replace(lengths=np.array([T, 1]))]),
        bad=(
          tuple(GOOD_BATCH),
          GOOD_BATCH._replace(targets=np.zeros(3)),
          jax.tree.map(lambda x: x[:0], GOOD_BATCH),
          fptt_jax.Batch,
        ),
      ),
      loss=Kind(
        st.just(losses.terminal_regression()), bad=(losses.terminal_regression,)
      ),
      mesh=TRAINER['mesh']._replace(
        good=st.just(jax.sharding.Mesh(jax.devices()[:2], ('devices',))),
        may=lambda value: False,
      ),
      stacked=Kind(st.just(False), bad=(True, 1)),
    ),
    check_global_batch,
  ),
}


@share_and_study(200, 5000)
def test_functions_of_plain_values(examples):
  """What they give is what they say, up to the ends of float32 and int32."""

  def accepts(case):
    name, call = case
    # Millions of windows mean something, and fill the memory.
    assume(
      name != 'cut'
      or sum(is_real(value) and value > 10**6 for value in call[0].values()) < 2
    )
    function, _, check = FUNCTIONS[name]
    done, result = accepted(call, function)
    if done:
      check(result)
    return done

  fuzz(
    of_table({name: kinds for name, (_, kinds, _) in FUNCTIONS.items()}),
    accepts,
    examples,
  )


# Flags.

CONFIGS = {
  'add_task': add_task.Config,
  'images': images.Config,
  'language_model': language_model.Config,
  'paper': PaperConfig,
  'benchmark': BenchmarkConfig,
  'data': DataConfig,
}
INTEGERS = (
  st.sampled_from([-1, 0, 1, 2, 3, 10, 100, 2**31 - 1, 2**31, 10**30]) | st.integers()
)
FLOATS = (
  st.sampled_from(
    [0.0, 1.0, 0.5, 2.0, 1e-3, -1.0, 1e-50, 1e39, 1e300, math.nan, math.inf, -math.inf]
  )
  | st.floats()
)
TEXTS = st.text(max_size=6)


def lists(field: dataclasses.Field) -> st.SearchStrategy[Any]:
  """The texts of a list flag: those of the default, and others."""
  known = {
    'method': list(fptt_jax.METHODS),
    'methods': ['all', *fptt_jax.METHODS],
    'cases': list(cases.CASES),
    'lines': ['all', 'bptt'],
    'grid': [
      'lr=0.1:0.01',
      'alpha=0.1:0.5',
      'lr=1',
      'clip=0:1',
      'beta=0.5:nan',
      'kappa=1:1',
      'lr',
      'lr=',
      '=1',
      'lr=1e999:1',
    ],
  }.get(
    field.name,
    [
      '0',
      '1',
      '2',
      '0:3',
      '5:2',
      '3:3',
      ' 4 ',
      '-1',
      '1.5',
      '',
      ':',
      '1:2:3',
      '²',
      '٣',
      '0:999999999999',
      '9' * 5000,
    ],
  )
  if field.name == 'grid':
    values = st.lists(
      st.sampled_from(
        ['0.1', '0.5', '1', '1e-3', 'nan', 'inf', '-1', 'x', '1e-50', '1e39']
      ),
      max_size=3,
    )
    built = st.tuples(st.sampled_from(list(recipe.HYPERPARAMETERS)), values).map(
      lambda pair: f'{pair[0]}={":".join(pair[1])}'
    )
    return st.lists(st.sampled_from(known) | built | TEXTS, max_size=3)
  return st.lists(st.sampled_from(known), max_size=3) | st.lists(
    st.sampled_from(known) | TEXTS, max_size=3
  )


def flag_values(field: dataclasses.Field) -> st.SearchStrategy[Any]:
  """What absl makes of a flag's text: of the flag's type, whatever its value; texts, in
  a list.
  """
  default, choices = field.default, field.metadata['choices']
  if isinstance(default, tuple):
    return lists(field)
  if choices:
    return st.sampled_from(choices)
  if isinstance(default, bool):
    return st.booleans()
  if isinstance(default, int) or 'int' in str(field.type):
    return (st.none() | INTEGERS) if default is None else INTEGERS
  is_float = isinstance(default, float) or (
    default is None and 'float' in str(field.type)
  )
  if is_float:
    return (st.none() | FLOATS) if default is None else FLOATS
  return TEXTS | st.sampled_from(['x.npz', 'folder'])


@st.composite
def settings_of_flags(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
  """(script, values of some of its flags)."""
  script = draw(st.sampled_from(list(CONFIGS)))
  fields = {field.name: field for field in dataclasses.fields(CONFIGS[script])}
  given = draw(st.lists(st.sampled_from(list(fields)), max_size=4, unique=True))
  values = {name: draw(flag_values(fields[name])) for name in given}
  if script == 'data' and draw(st.booleans()):
    values |= {'output': 'x.npz'}
  return script, values


def check_before_training(config: Any) -> None:
  """What stands between a configuration and the first step, on shapes alone, for models
  of no more than a few million weights.
  """
  num_steps = getattr(config, 'seq_len', 28)
  make_optimizers = [
    optimizers.make_optimizer(chosen, method)
    for _, chosen in config.variants()
    for method in config.method
  ]
  for tx in make_optimizers[:3]:
    jax.eval_shape(tx.init, {'w': jnp.ones(2)})
  done, _ = attempt(config.check_length, num_steps)
  if (
    not done
    or num_steps > 10**5
    or max(
      config.hidden,
      getattr(config, 'readout_hidden', 0),
      getattr(config, 'embedding', 0),
    )
    > 512
  ):
    return
  if (
    getattr(config, 'layers', 1) > 4
    or getattr(config, 'last_hidden', 0) > 512
    or getattr(config, 'experts', 0) > 64
  ):
    return
  for method in config.method:
    assert 1 <= recipe.window_steps(config, method, num_steps) <= num_steps
  if isinstance(config, images.Config):
    if not attempt(images.check_fit, config, num_steps)[0]:
      return
    model, x = images.make_model(config, num_steps, 3, 10), jnp.zeros((2, 2, 3))
  elif isinstance(config, language_model.Config):
    model, x = language_model.make_model(config, 20), jnp.zeros((2, 2), jnp.int32)
  else:
    model, x = add_task.make_model(config), jnp.zeros((2, 2, 2))
  end, _ = jax.eval_shape(
    lambda: model.apply(model.init(KEY), model.initial_state(2), x, None, None)
  )
  assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(end))


@share_and_study(120, 4000)
def test_flags(examples):
  """A configuration is one that training can start from, or its flag is named; list
  flags begin as texts.
  """

  def accepts(case):
    script, values = case
    kind = CONFIGS[script]

    def parse():
      fields = {field.name: field for field in dataclasses.fields(kind)}
      return kind(
        **{name: flags._read(fields[name], value) for name, value in values.items()}
      )

    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      done, config = attempt(parse, start='--')
      if done and isinstance(config, recipe.Recipe):
        check_before_training(config)
    return done

  fuzz(settings_of_flags(), accepts, examples)
