"""Layers equal torch, Flax's cells and their equations; adapters and stacks keep their
contract.
"""

from collections.abc import Callable
import dataclasses
import functools
import subprocess
import sys
from typing import Any
import warnings

import chex
from flax import linen, nnx
from helpers import quick
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import nn

T, B, D, H = 5, 3, 2, 4
KEY = jax.random.key(0)
LAYERS: dict[str, Callable[[], fptt_jax.Model]] = {
  'LSTM': lambda: nn.from_nnx(lambda rngs: nn.LSTM(D, H, rngs=rngs)),
  'GRU': lambda: nn.from_nnx(lambda rngs: nn.GRU(D, H, rngs=rngs)),
  'RNN': lambda: nn.from_nnx(lambda rngs: nn.ElmanRNN(D, H, rngs=rngs)),
  'AntisymmetricRNN': lambda: nn.from_nnx(
    lambda rngs: nn.AntisymmetricRNN(D, H, epsilon=0.5, rngs=rngs)
  ),
  'nnx cell': lambda: nn.from_nnx(lambda rngs: nnx.GRUCell(D, H, rngs=rngs)),
  'linen cell': lambda: nn.from_linen(linen.OptimizedLSTMCell(H), (D,)),
  'Sequential': lambda: nn.from_nnx(
    lambda rngs: nn.Sequential(
      nn.LSTM(D, H, rngs=rngs),
      jnp.tanh,
      nnx.GRUCell(H, 3, rngs=rngs),
      nnx.Linear(3, 2, rngs=rngs),
    )
  ),
}
EACH_LAYER = pytest.mark.parametrize('name', list(LAYERS))
OWN_LAYERS = pytest.mark.parametrize(
  'layer', [nn.LSTM, nn.GRU, nn.ElmanRNN, nn.AntisymmetricRNN]
)
STATELESS = pytest.mark.filterwarnings('ignore:.*no hidden state:UserWarning')
CLOSE = dict(rtol=1e-5, atol=1e-6)


@functools.cache
def built(name: str) -> tuple[Any, Callable[..., Any]]:
  """Return a layer's parameters and its compiled evaluation (state, x, mask) -> (state,
  y).
  """
  model = LAYERS[name]()
  params = quick(model.init)(jax.random.key(1))
  run = quick(lambda state, x, mask: model.apply(params, state, x, mask, None))
  return model, lambda x, mask=None, state=None: run(
    model.initial_state(x.shape[1]) if state is None else state, x, mask
  )


def random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def size(params: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def parameter_count(build: Callable[[nnx.Rngs], nnx.Module]) -> int:
  return size(jax.eval_shape(nn.from_nnx(build).init, KEY))


# What holds of every layer.


@EACH_LAYER
def test_outputs_depend_on_the_past_only(name):
  """Inputs from step 3 on change no earlier output by a single bit, and no
  other row.
  """
  _, run = built(name)
  x, changed = random(T, B, D), random(T, B, D)
  changed[3:, 1] += 1
  y, y_changed = np.asarray(run(x)[1]), np.asarray(run(changed)[1])
  np.testing.assert_array_equal(y_changed[:3], y[:3])
  np.testing.assert_array_equal(y_changed[:, [0, 2]], y[:, [0, 2]])
  assert np.any(y_changed[3:, 1] != y[3:, 1], axis=-1).all()


@EACH_LAYER
def test_masked_steps_leave_the_state(name):
  """The state is the one after each sequence's own valid steps, and a fully masked
  window returns its state bit for bit. Outputs at valid steps equal those without a
  mask.
  """
  _, run = built(name)
  x, lengths = random(T, B, D), [5, 2, 3]
  state, y = run(x, np.arange(T)[:, None] < lengths)
  for row, length in enumerate(lengths):
    alone, y_alone = run(x[:length])
    chex.assert_trees_all_close(
      jax.tree.map(lambda s: s[row], state),
      jax.tree.map(lambda s: s[row], alone),
      **CLOSE,
    )
    np.testing.assert_allclose(y[:length, row], y_alone[:, row], **CLOSE)
  assert np.any(np.asarray(jax.tree.leaves(state)[0]))
  chex.assert_trees_all_equal(run(x, np.zeros((T, B), bool), state)[0], state)
  chex.assert_trees_all_close(run(x, np.ones((T, B), bool)), run(x), **CLOSE)


@EACH_LAYER
def test_windows_join(name):
  """Two windows with the state carried equal one long window in state and outputs."""
  _, run = built(name)
  x = random(T, B, D)
  state, first = run(x[:2])
  state, second = run(x[2:], None, state)
  whole_state, whole = run(x)
  chex.assert_trees_all_close(state, whole_state, **CLOSE)
  np.testing.assert_allclose(np.concatenate([first, second]), whole, **CLOSE)


@EACH_LAYER
def test_initialization_is_pure_and_may_be_mapped(name):
  """The same key gives the same floating-point parameters, also under vmap
  over seeds.
  """
  model, _ = built(name)
  keys = jax.random.split(KEY, 2)
  many = quick(jax.vmap(model.init))(keys)
  one = quick(model.init)(keys[1])
  chex.assert_trees_all_close(
    jax.tree.map(lambda p: p[1], many), one, rtol=1e-5, atol=1e-6
  )
  assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(one))
  assert any(np.any(leaf[0] != leaf[1]) for leaf in jax.tree.leaves(many))


@OWN_LAYERS
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures('strict_dtypes')
def test_layers_keep_their_dtype(layer, dtype):
  """Parameters, state and outputs have param_dtype; nothing is promoted."""
  model = nn.from_nnx(lambda rngs: layer(D, H, param_dtype=dtype, rngs=rngs))

  def run(key, x):
    return (
      model.init(key),
      *model.apply(model.init(key), model.initial_state(B), x, None, None),
    )

  params, state, y = jax.eval_shape(run, KEY, jax.ShapeDtypeStruct((T, B, D), dtype))
  assert {leaf.dtype for leaf in jax.tree.leaves((params, state, y))} == {
    jnp.dtype(dtype)
  }
  assert jax.tree.map(lambda s: (s.shape, s.dtype), state) == jax.tree.map(
    lambda s: (s.shape, s.dtype), model.initial_state(B)
  )


# Torch.


@pytest.fixture(scope='module')
def torch() -> Any:
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return pytest.importorskip('torch')


@pytest.mark.parametrize(
  ('kind', 'layers', 'bias'),
  [
    ('LSTM', 1, True),
    ('LSTM', 3, True),
    ('GRU', 2, True),
    ('GRU', 1, False),
    ('RNN', 2, True),
  ],
)
def test_layers_compute_what_torch_computes(torch, kind, layers, bias):
  """With torch's weights, outputs and final states equal torch's from a given state,
  for one layer and several.
  """
  torch.manual_seed(0)
  module = getattr(torch.nn, kind)(D, H, layers, bias=bias)
  ours = getattr(nn, 'ElmanRNN' if kind == 'RNN' else kind)
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(
      *(ours(D if i == 0 else H, H, rngs=rngs) for i in range(layers))
    )
  )
  params = {'layers': dict(enumerate(nn.from_torch(module.state_dict())))}
  chex.assert_trees_all_equal_shapes_and_dtypes(params, jax.eval_shape(model.init, KEY))
  x, h, c = random(T, B, D), random(layers, B, H, seed=1), random(layers, B, H, seed=2)
  start = [torch.tensor(h), torch.tensor(c)] if kind == 'LSTM' else torch.tensor(h)
  with torch.no_grad():
    expected, last = module(torch.tensor(x), start)
  state = tuple(
    nn.LSTMState(h[i], c[i]) if kind == 'LSTM' else h[i] for i in range(layers)
  )
  state, y = quick(lambda p, s, x: model.apply(p, s, x, None, None))(params, state, x)
  np.testing.assert_allclose(y, expected.numpy(), rtol=1e-5, atol=1e-5)
  for i, layer_state in enumerate(state):
    parts = (
      zip(layer_state, last, strict=True) if kind == 'LSTM' else [(layer_state, last)]
    )
    for ours_now, torchs in parts:
      np.testing.assert_allclose(ours_now, torchs[i].numpy(), rtol=1e-5, atol=1e-5)


def sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize('kind', ['LSTM', 'GRU', 'ElmanRNN'])
def test_layers_with_torchs_weights_follow_its_documented_equations(kind):
  """With both biases, in NumPy, where torch itself is not installed."""
  rng, gates = np.random.default_rng(0), {'LSTM': 4, 'GRU': 3, 'ElmanRNN': 1}[kind]
  sizes = {
    'weight_ih_l0': (gates * H, D),
    'weight_hh_l0': (gates * H, H),
    'bias_ih_l0': (gates * H,),
    'bias_hh_l0': (gates * H,),
  }
  w = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
  x = rng.normal(size=(T, B, D)).astype(np.float32)
  h, c = rng.normal(size=(2, B, H)).astype(np.float32)
  model = nn.from_nnx(lambda rngs: getattr(nn, kind)(D, H, rngs=rngs))
  [params] = nn.from_torch(w)
  start = nn.LSTMState(h, c) if kind == 'LSTM' else h
  run = quick(lambda params, start, x: model.apply(params, start, x, None, None)[1])
  outputs = run(params, start, x)
  for t in range(T):
    inputs = x[t] @ w['weight_ih_l0'].T + w['bias_ih_l0']
    state = h @ w['weight_hh_l0'].T + w['bias_hh_l0']
    if kind == 'LSTM':
      i, f, g, o = np.split(inputs + state, 4, -1)
      c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
      h = sigmoid(o) * np.tanh(c)
    elif kind == 'GRU':
      (ri, zi, ni), (rh, zh, nh) = np.split(inputs, 3, -1), np.split(state, 3, -1)
      z = sigmoid(zi + zh)
      h = (1 - z) * np.tanh(ni + sigmoid(ri + rh) * nh) + z * h
    else:
      h = np.tanh(inputs + state)
    np.testing.assert_allclose(outputs[t], h, rtol=1e-4, atol=1e-5)


def torch_names(*shapes: tuple[int, ...], suffix: str = 'l0') -> dict[str, np.ndarray]:
  names = [
    f'{part}_{side}_{suffix}' for part in ('weight', 'bias') for side in ('ih', 'hh')
  ]
  return {name: random(*shape) for name, shape in zip(names, shapes, strict=False)}


def test_from_torch_takes_numpy_arrays():
  """A mapping of torch's names to NumPy arrays suffices. Biases are summed, except the
  GRU's.
  """
  weights = torch_names((8, 3), (8, 2), (8,), (8,))
  (params,) = nn.from_torch(weights)
  np.testing.assert_array_equal(params['w_x'], weights['weight_ih_l0'].T)
  np.testing.assert_array_equal(params['w_h'], weights['weight_hh_l0'].T)
  np.testing.assert_array_equal(
    params['bias'], weights['bias_ih_l0'] + weights['bias_hh_l0']
  )
  assert set(nn.from_torch(torch_names((6, 3), (6, 2), (6,), (6,)))[0]) == {
    'w_x',
    'w_h',
    'bias',
    'recurrent_bias',
  }


@pytest.mark.parametrize(
  ('weights', 'message'),
  [
    (
      torch_names((8, 3), (8, 2)) | {'weight_ih_l0_reverse': random(8, 3)},
      r'state_dict .*_reverse',
    ),
    (
      torch_names((8, 3), (8, 2)) | {'weight_hr_l0': random(2, 2)},
      r'state_dict .*weight_hr_l0',
    ),
    ({}, r'state_dict .*\[\]'),
    ({'kernel': random(2, 2)}, r"state_dict .*\['kernel'\]"),
    (torch_names((8, 3)), r'state_dict .*weight_hh_l0.*weight_ih_l0'),
    (
      torch_names((10, 3), (10, 2)),
      r'weight_ih_l0.*\(10, 3\), \(10, 2\)',
    ),
    (torch_names((6, 3), (8, 2)), r'weight_ih_l0.*\(6, 3\), \(8, 2\)'),
  ],
  ids=[
    'bidirectional',
    'projections',
    'empty',
    'other names',
    'half a layer',
    'five gates',
    'two widths',
  ],
)
def test_from_torch_rejects_other_modules(weights, message):
  """Names and shapes that no plain recurrent module has raise an error."""
  with pytest.raises(ValueError, match=message):
    nn.from_torch(weights)


# Flax.


@pytest.mark.parametrize('cell', [nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell])
def test_from_nnx_runs_flaxs_cells(cell):
  """A window equals the cell called step by step, and parameters equal the cell's for
  the same key.
  """
  model = nn.from_nnx(lambda rngs: cell(D, H, rngs=rngs))
  module, x = cell(D, H, rngs=nnx.Rngs(KEY)), random(T, B, D)
  params = model.init(KEY)
  chex.assert_trees_all_equal(
    jax.tree.leaves(params),
    jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param))),
  )
  state, y = quick(lambda p, x: model.apply(p, model.initial_state(B), x, None, None))(
    params, x
  )
  carry, expected = module.initialize_carry((B, D), nnx.Rngs(0)), []
  for x_t in x:
    carry, y_t = module(carry, jnp.asarray(x_t))
    expected.append(y_t)
  chex.assert_trees_all_close((state, y), (carry, jnp.stack(expected)), **CLOSE)


class Tagger(linen.Module):
  """A Linen per-step module with embedding, cell and readout inside."""

  @linen.compact
  def __call__(self, carry, token):
    carry, h = linen.GRUCell(H)(carry, linen.Embed(7, D)(token))
    return carry, linen.Dense(3)(h)

  def initialize_carry(self, key, input_shape):
    return linen.GRUCell(H, parent=None).initialize_carry(key, (*input_shape, D))


@pytest.mark.parametrize(
  ('module', 'shape', 'dtype'),
  [
    (linen.OptimizedLSTMCell(H), (D,), jnp.float32),
    (linen.GRUCell(H), (D,), jnp.float32),
    (Tagger(), (), jnp.int32),
  ],
  ids=['OptimizedLSTMCell', 'GRUCell', 'own module'],
)
def test_from_linen_runs_linens_modules(module, shape, dtype):
  """A window equals the Linen module called step by step, for features and tokens."""
  model = nn.from_linen(module, shape, dtype)
  x = (
    random(T, B, *shape)
    if shape
    else np.random.default_rng(0).integers(0, 7, (T, B)).astype(np.int32)
  )
  params = quick(model.init)(KEY)
  state, y = quick(lambda p, x: model.apply(p, model.initial_state(B), x, None, None))(
    params, x
  )
  carry, expected = module.initialize_carry(KEY, (B, *shape)), []
  step = quick(lambda p, carry, x_t: module.apply({'params': p}, carry, x_t))
  for x_t in x:
    carry, y_t = step(params, carry, x_t)
    expected.append(y_t)
  chex.assert_trees_all_close((state, y), (carry, jnp.stack(expected)), **CLOSE)


class LinenDropout(linen.Module):
  """A Linen per-step module with dropout only."""

  @linen.compact
  def __call__(self, carry, x):
    return carry, linen.Dropout(0.5, deterministic=not self.has_rng('dropout'))(x)

  def initialize_carry(self, key, input_shape):
    return jnp.zeros(input_shape)


def test_linen_dropout_is_seeded_by_the_key():
  """With a key, each step has a new dropout stream; without one, the module is
  deterministic.
  """
  model, x = nn.from_linen(LinenDropout(), (64,)), np.ones((8, 2, 64), np.float32)
  run = quick(
    lambda key: model.apply(model.init(KEY), model.initial_state(2), x, None, key)[1]
  )
  one = np.asarray(run(jax.random.key(1)))
  np.testing.assert_array_equal(run(None), x)
  np.testing.assert_array_equal(run(jax.random.key(1)), one)
  assert set(np.unique(one)) == {0.0, 2.0}
  assert len({step.tobytes() for step in one}) == 8
  assert np.any(run(jax.random.key(2)) != one)


def test_lstm_equals_flaxs_with_its_weights():
  """The gates are in flax's order too: OptimizedLSTMCell's kernels and bias are `w_x`,
  `w_h` and `bias`. Its carry is (c, h).
  """
  cell, x = nnx.OptimizedLSTMCell(D, H, rngs=nnx.Rngs(0)), random(T, B, D)
  params = {
    'w_x': cell.dense_i.kernel[...],
    'w_h': cell.dense_h.kernel[...],
    'bias': cell.dense_h.bias[...] + random(4 * H),
  }
  cell.dense_h.bias[...] = params['bias']
  ours = nn.from_nnx(lambda rngs: nn.LSTM(D, H, rngs=rngs))
  theirs = nn.from_nnx(lambda rngs: nnx.OptimizedLSTMCell(D, H, rngs=rngs))
  state, y = quick(lambda p, x: ours.apply(p, ours.initial_state(B), x, None, None))(
    params, x
  )
  cell_params = nnx.to_pure_dict(nnx.state(cell, nnx.Param))
  (c, h), expected = quick(
    lambda p, x: theirs.apply({'cell': p}, theirs.initial_state(B), x, None, None)
  )(cell_params, x)
  chex.assert_trees_all_close((state, y), (nn.LSTMState(h=h, c=c), expected), **CLOSE)


# The layers' own equations, sizes and initial values.


@pytest.mark.usefixtures('x64')
def test_antisymmetric_rnn_by_its_equation():
  """A window equals Equation 14 in NumPy, with the matrix built entry by entry. The
  tanh part comes first, the gate second.
  """
  model = nn.from_nnx(
    lambda rngs: nn.AntisymmetricRNN(
      D, H, epsilon=0.3, gamma=0.2, param_dtype=jnp.float64, rngs=rngs
    )
  )
  params = quick(model.init)(KEY) | {'bias': random(2 * H, seed=3).astype(np.float64)}
  w, v, bias = (np.asarray(params[name]) for name in ('w', 'v', 'bias'))
  upper, entries = np.zeros((H, H)), iter(w)
  for i in range(H):
    for j in range(i + 1, H):
      upper[i, j] = next(entries)
  a = upper - upper.T - 0.2 * np.eye(H)
  x, h = random(T, B, D).astype(np.float64), random(B, H, seed=1).astype(np.float64)
  _, y = quick(lambda p, h, x: model.apply(p, h, x, None, None))(params, h, x)
  h = h.copy()  # JAX may still read the array that it was given.
  for t in range(T):
    for b in range(B):
      recurrent, drive = a @ h[b], x[t, b] @ v + bias
      gate = 1 / (1 + np.exp(-(recurrent + drive[H:])))
      h[b] = h[b] + 0.3 * gate * np.tanh(recurrent + drive[:H])
    np.testing.assert_allclose(y[t], h, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
  ('build', 'count'),
  [
    (lambda rngs: nn.LSTM(1, 128, rngs=rngs), 66_560),
    (lambda rngs: nn.LSTM(3, 128, rngs=rngs), 67_584),
    (lambda rngs: nn.GRU(3, 128, rngs=rngs), 51_072),
    (lambda rngs: nn.GRU(3, 128, recurrent_bias=False, rngs=rngs), 50_688),
    (lambda rngs: nn.ElmanRNN(3, 128, rngs=rngs), 16_896),
    (
      lambda rngs: nn.Sequential(
        nn.AntisymmetricRNN(3, 256, rngs=rngs), nnx.Linear(256, 10, rngs=rngs)
      ),
      37_258,
    ),
  ],
  ids=[
    'LSTM D=1',
    'LSTM D=3',
    'GRU',
    'GRU one bias',
    'RNN',
    'AntisymmetricRNN with head',
  ],
)
def test_parameter_counts(build, count):
  """The counts are the papers' 66K, 67K, 51K and 37K."""
  assert parameter_count(build) == count


@pytest.mark.parametrize(
  ('layer', 'biases'), [(nn.LSTM, 2), (nn.GRU, 1), (nn.ElmanRNN, 2)]
)
def test_torchs_initialization(layer, biases):
  """Weights are uniform in ±1/√H. A bias in place of torch's two is the sum of two such
  draws.
  """
  params = quick(nn.from_nnx(lambda rngs: layer(64, 64, rngs=rngs)).init)(KEY)
  bound = 64**-0.5
  for name in ('w_x', 'w_h'):
    w = np.asarray(params[name])
    assert np.abs(w).max() <= bound
    assert w.max() > 0.99 * bound
    assert w.min() < -0.99 * bound
    assert abs(w.mean()) < 0.05 * bound
    np.testing.assert_allclose(w.std(), bound / 3**0.5, rtol=0.05)
  assert np.abs(params['bias']).max() <= biases * bound
  np.testing.assert_allclose(
    np.std(params['bias']), bound * (biases / 3) ** 0.5, rtol=0.25
  )


@pytest.mark.parametrize(
  ('dtype', 'tolerance'),
  [(jnp.float32, 1e-5), (jnp.float16, 2e-3), (jnp.bfloat16, 2e-2)],
)
@pytest.mark.parametrize(
  ('layer', 'gates'), [(nn.LSTM, 4), (nn.GRU, 3), (nn.ElmanRNN, 1)]
)
def test_flaxs_initialization(layer, gates, dtype, tolerance):
  """Recurrent weights are one orthogonal block per gate, input weights LeCun normal,
  biases 0.
  """
  params = quick(
    nn.from_nnx(
      lambda rngs: layer(64, 16, init='flax', param_dtype=dtype, rngs=rngs)
    ).init
  )(KEY)
  assert params['w_h'].dtype == dtype
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
  blocks = np.split(params['w_h'], gates, axis=1)
  for block in blocks:
    np.testing.assert_allclose(block.T @ block, np.eye(16), atol=tolerance)
  assert all(np.abs(block - blocks[0]).max() > 0.1 for block in blocks[1:])
  np.testing.assert_allclose(np.std(params['w_x']), 1 / 8, rtol=0.1)
  assert not np.any(params['bias'])


@pytest.mark.parametrize('init', ['torch', 'flax'])
def test_forget_bias_replaces_the_forget_gates_part(init):
  """`forget_bias` sets the second gate's initial bias and no other."""

  def make(forget_bias):
    return np.asarray(
      nn.from_nnx(
        lambda rngs: nn.LSTM(D, H, init=init, forget_bias=forget_bias, rngs=rngs)
      ).init(KEY)['bias']
    )

  bias, plain = make(1.5), make(None)
  np.testing.assert_array_equal(bias[H : 2 * H], 1.5)
  np.testing.assert_array_equal(
    np.delete(bias, np.s_[H : 2 * H]), np.delete(plain, np.s_[H : 2 * H])
  )
  assert not np.any(plain[H : 2 * H] == 1.5)


def test_antisymmetric_initialization():
  """W is normal with variance σ²/H, V with 1/D, and biases are 0."""
  params = quick(
    nn.from_nnx(lambda rngs: nn.AntisymmetricRNN(64, 64, w_scale=2.0, rngs=rngs)).init
  )(KEY)
  np.testing.assert_allclose(np.std(params['w']), 2 / 8, rtol=0.05)
  np.testing.assert_allclose(np.std(params['v']), 1 / 8, rtol=0.05)
  assert not np.any(params['bias'])


# Stacks.


def language_model(dropout: float = 0.5) -> fptt_jax.Model:
  return nn.from_nnx(
    lambda rngs: nn.Sequential(
      nnx.Embed(7, D, rngs=rngs),
      nnx.Dropout(dropout),
      nn.LSTM(D, H, rngs=rngs),
      nnx.Dropout(dropout),
      nn.GRU(H, 3, rngs=rngs),
      nnx.Linear(3, 7, rngs=rngs),
    )
  )


def test_stack_runs_its_layers_one_after_the_other():
  """Embedding, two layers and readout equal the layers called one by one. The state
  holds the recurrent layers' states.
  """
  model = language_model()
  params, tokens = (
    quick(model.init)(KEY),
    np.random.default_rng(0).integers(0, 7, (T, B)).astype(np.int32),
  )
  state, logits = quick(
    lambda p, x: model.apply(p, model.initial_state(B), x, None, None)
  )(params, tokens)

  def by_hand(params, tokens):
    layers = params['layers']
    lstm, gru = (
      nn.from_nnx(lambda rngs: nn.LSTM(D, H, rngs=rngs)),
      nn.from_nnx(lambda rngs: nn.GRU(H, 3, rngs=rngs)),
    )
    lstm_state, x = lstm.apply(
      layers[2], lstm.initial_state(B), layers[0]['embedding'][tokens], None, None
    )
    gru_state, x = gru.apply(layers[4], gru.initial_state(B), x, None, None)
    return (lstm_state, gru_state), x @ layers[5]['kernel'] + layers[5]['bias'][
      None, None
    ]

  chex.assert_trees_all_close((state, logits), quick(by_hand)(params, tokens), **CLOSE)
  chex.assert_shape(logits, (T, B, 7))


def test_stack_without_a_key_is_deterministic():
  """Without a key there is no dropout. The same key gives the same numbers and another
  key others, also if the module has its own streams.
  """
  model = language_model()
  params, tokens = quick(model.init)(KEY), np.ones((T, B), np.int32)
  run = quick(
    lambda key: model.apply(params, model.initial_state(B), tokens, None, key)[1]
  )
  silent, one, other = run(None), run(jax.random.key(1)), run(jax.random.key(2))
  plain = language_model(dropout=0.0)
  no_dropout = quick(
    lambda key: plain.apply(params, plain.initial_state(B), tokens, None, key)[1]
  )
  np.testing.assert_allclose(no_dropout(jax.random.key(1)), silent, **CLOSE)
  np.testing.assert_array_equal(run(jax.random.key(1)), one)
  assert np.abs(one - silent).max() > 1e-3
  assert np.abs(one - other).max() > 1e-3


@STATELESS
@pytest.mark.parametrize('streams', [False, True])
def test_dropout_masks_are_fresh_for_each_step_unit_and_layer(streams):
  """On ones, about half of the units are 0 and the others 1/keep. Masks differ between
  steps and between layers, with and without streams in the layers.
  """

  def make(rngs):
    return nnx.Dropout(0.5, rngs=rngs if streams else None)

  one = nn.from_nnx(lambda rngs: nn.Sequential(make(rngs)))
  two = nn.from_nnx(lambda rngs: nn.Sequential(make(rngs), make(rngs)))
  x = jnp.ones((8, 4, 64))
  (state, y), (_, yy) = (
    quick(lambda key: m.apply({}, (), x, None, key))(KEY) for m in (one, two)
  )
  assert state == ()
  assert set(np.unique(y)) == {0.0, 2.0}
  assert set(np.unique(yy)) == {0.0, 4.0}
  assert abs(np.mean(np.asarray(y) > 0) - 0.5) < 0.05
  assert abs(np.mean(np.asarray(yy) > 0) - 0.25) < 0.05
  assert len({np.asarray(step).tobytes() for step in y}) == 8
  assert len({np.asarray(row).tobytes() for row in y[0]}) == 4


# Errors.


class Counting(nnx.Module):
  """A recurrent module that keeps batch statistics."""

  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(D, rngs=rngs)

  def initial_state(self, batch_size):
    return ()

  def __call__(self, state, x, mask=None, key=None):
    return state, self.norm(x)


def test_modules_with_other_state_raise():
  """The error names batch statistics, in a single module and inside a stack."""
  for build in (
    Counting,
    lambda rngs: nn.Sequential(
      nn.ElmanRNN(D, D, rngs=rngs), nnx.BatchNorm(D, rngs=rngs)
    ),
  ):
    with pytest.raises(TypeError, match=r'BatchStat at .*mean.*LayerNorm'):
      nn.from_nnx(build)


class Fixed(nnx.Module):
  """A layer with constants; those of `drawn` depend on the key of the parameters."""

  def __init__(self, rngs, drawn=False):
    self.weight = nnx.Param(jnp.ones(D))
    self.limits = nnx.data(jnp.array([jnp.nan, 1.0]))
    self.key = nnx.data(rngs.params() if drawn else jax.random.key(3))

  def __call__(self, x):
    return x * self.weight[...][None, None] + jax.random.uniform(self.key)


def test_constants_may_be_keys_and_nan():
  """What is the same for each seed is no drawn array."""

  def layers(rngs, **options):
    return nn.Sequential(nn.ElmanRNN(D, D, rngs=rngs), Fixed(rngs, **options))

  model = nn.from_nnx(layers)
  params = model.init(KEY)
  shift = jax.random.uniform(jax.random.key(3))
  zeros = {'layers': {0: params['layers'][0], 1: {'weight': jnp.zeros(D)}}}
  _, y = model.apply(zeros, model.initial_state(B), jnp.zeros((T, B, D)), None, None)
  np.testing.assert_allclose(y, jnp.full((T, B, D), shift), rtol=1e-6)
  with pytest.raises(TypeError, match=r'arrays drawn from rngs .*key'):
    nn.from_nnx(lambda rngs: layers(rngs, drawn=True))


@pytest.mark.parametrize('layer', [nn.LSTM, nn.LRU])
@pytest.mark.parametrize('implementation', ['auto', 'custom_vjp', 'scan'])
def test_a_state_may_come_as_a_dict(layer, implementation):
  """With the names of the layer's own state, in any order, as checkpoints keep it."""
  run = layer(D, H, implementation=implementation, rngs=nnx.Rngs(0))
  x = jax.random.normal(KEY, (3, B, D))
  state, _ = run(run.initial_state(B), x)
  given = dict(reversed(state._asdict().items()))
  found, expected = run(given, x), run(state, x)
  chex.assert_trees_all_equal(found, expected)


class LinenCounting(linen.Module):
  """A Linen cell that keeps batch statistics."""

  @linen.compact
  def __call__(self, carry, x):
    return carry, linen.BatchNorm(use_running_average=True)(x)

  def initialize_carry(self, key, input_shape):
    return jnp.zeros(input_shape)


def test_linen_modules_with_other_collections_raise():
  """The error names the collection that is not 'params'."""
  with pytest.raises(TypeError, match=r'batch_stats.*LayerNorm'):
    nn.from_linen(LinenCounting(), (D,))


def test_modules_that_are_not_recurrent_raise():
  """The error advises to put them into a Sequential."""
  with pytest.raises(
    TypeError,
    match=r'recurrent .*Linear.*Sequential',
  ):
    nn.from_nnx(lambda rngs: nnx.Linear(D, H, rngs=rngs))
  with pytest.raises(
    TypeError,
    match=r'module .*initialize_carry.* Dense',
  ):
    nn.from_linen(linen.Dense(3), (D,))


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (
      lambda rngs: nn.LSTM(D, H, init='xavier', rngs=rngs),
      r"init .*'xavier'",
    ),
    (
      lambda rngs: nn.GRU(0, H, rngs=rngs),
      r'in_features .*0',
    ),
    (
      lambda rngs: nn.ElmanRNN(D, 0, rngs=rngs),
      r'hidden_features .*0',
    ),
    (
      lambda rngs: nn.AntisymmetricRNN(D, H, epsilon=0, rngs=rngs),
      r'epsilon .*0',
    ),
    (
      lambda rngs: nn.AntisymmetricRNN(D, H, gamma=-1.0, rngs=rngs),
      r'gamma .*-1\.0',
    ),
    (
      lambda rngs: nn.Sequential(),
      r'layers .*got \(\)',
    ),
  ],
)
def test_impossible_layers_raise(build, message):
  """The error names the argument and the value when the layer is built."""
  with pytest.raises(ValueError, match=message):
    nn.from_nnx(build)


@OWN_LAYERS
def test_inputs_of_other_features_raise(layer):
  """The error names the layer and the shape received."""
  model = nn.from_nnx(lambda rngs: layer(D, H, rngs=rngs))
  for shape in ((T, B, D + 1), (T, B)):
    with pytest.raises(
      ValueError,
      match=rf'inputs of {layer.__name__} .*\({T}, {B}',
    ):
      jax.eval_shape(
        lambda x: model.apply(model.init(KEY), model.initial_state(B), x, None, None),
        jnp.zeros(shape),
      )


def test_core_does_not_import_flax():
  """`import fptt_jax` does not load Flax; `fptt_jax.nn` does."""
  code = (
    'import sys, fptt_jax; a = "flax" in sys.modules; import fptt_jax.nn; print(a, '
    '"flax" in sys.modules)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ['False', 'True']


class NoisyReadout(nnx.Module):
  """Two dropout layers with separate random streams."""

  def __init__(self, rngs):
    self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return jnp.stack([self.first(x), self.second(x)], -1)


def test_random_streams_of_a_modules_own():
  """Streams are off in evaluation. In training, each gets its own mask from the
  window's key.
  """
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(nn.LSTM(2, 8, rngs=rngs), NoisyReadout(rngs))
  )
  params, x = model.init(jax.random.key(0)), jnp.ones((3, 2, 2))
  _, quiet = model.apply(params, model.initial_state(2), x, None, None)
  np.testing.assert_array_equal(quiet[..., 0], quiet[..., 1])
  _, noisy = model.apply(params, model.initial_state(2), x, None, jax.random.key(1))
  masks = np.asarray(noisy) == 0
  assert masks.any()
  assert (masks[..., 0] != masks[..., 1]).any()
  _, same = model.apply(params, model.initial_state(2), x, None, jax.random.key(1))
  _, other = model.apply(params, model.initial_state(2), x, None, jax.random.key(2))
  np.testing.assert_array_equal(noisy, same)
  assert (noisy != other).any()


def test_low_precision_layers_take_float32_inputs():
  """Layers compute in the dtype of their parameters, whatever the inputs' dtype."""
  for layer in (nn.LSTM, nn.GRU, nn.ElmanRNN, nn.AntisymmetricRNN):
    model = nn.from_nnx(lambda rngs: layer(2, 4, param_dtype=jnp.bfloat16, rngs=rngs))
    state, y = model.apply(
      model.init(jax.random.key(0)),
      model.initial_state(3),
      jnp.ones((5, 3, 2)),
      None,
      None,
    )
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}


def test_wrong_builders_and_cells_raise():
  """A module in place of a function, a class in place of a module, a cell that owns
  random streams.
  """
  with pytest.raises(TypeError, match=r'build .*LSTM'):
    nn.from_nnx(nn.LSTM(1, 2, rngs=nnx.Rngs(0)))
  with pytest.raises(TypeError, match=r'module .*class .*GRUCell'):
    nn.from_linen(linen.GRUCell, (2,))

  class NoisyCell(nnx.SimpleCell):
    def __init__(self, in_features, hidden_features, *, rngs):
      super().__init__(in_features, hidden_features, rngs=rngs)
      self.dropout = nnx.Dropout(0.5, rngs=rngs)

  with pytest.raises(TypeError, match=r'^cell .*random streams, got NoisyCell'):
    nn.from_nnx(lambda rngs: NoisyCell(2, 3, rngs=rngs))


class Doubled(nn.LSTM):
  """A user's layer whose outputs are not part of its state."""

  def __call__(self, *args):
    state, y = super().__call__(*args)
    return state, 2 * y


LAST_LAYERS = {
  'outputs of its own': lambda rngs: [Doubled(2, 4, rngs=rngs)],
  'penalty': lambda rngs: [nn.GRU(2, 4, rngs=rngs), nn.ActivationPenalty(0.5)],
  'no recurrent layer': lambda rngs: [nnx.Linear(2, 4, rngs=rngs)],
  'flax cell': lambda rngs: [nnx.GRUCell(2, 4, rngs=rngs)],
  'plain scan': lambda rngs: [nn.LSTM(2, 4, implementation='scan', rngs=rngs)],
  'two': lambda rngs: [nn.LSTM(2, 4, rngs=rngs), nn.GRU(4, 4, rngs=rngs)],
  'WeightDrop': lambda rngs: [nn.WeightDrop(nn.LSTM(2, 4, rngs=rngs), 0.5)],
} | {
  layer.__name__: lambda rngs, layer=layer: [layer(2, 4, rngs=rngs)]
  for layer in (
    nn.LSTM,
    nn.GRU,
    nn.ElmanRNN,
    nn.AntisymmetricRNN,
    nn.FastGRNN,
    nn.IncrementalRNN,
    nn.IndRNN,
    nn.LRU,
  )
}


@STATELESS
@pytest.mark.parametrize('step', [4, np.array([0, 4, 2])], ids=['one', 'each its own'])
@pytest.mark.parametrize('readout', [True, False])
@pytest.mark.parametrize('layers', LAST_LAYERS)
def test_outputs_of_the_last_step_are_those_of_the_whole_window(layers, readout, step):
  """`apply_last` returns the state and penalties of `apply`, and its outputs at each
  sequence's last valid step.
  """

  def tail(rngs):
    return [jnp.tanh, nnx.Linear(4, 3, rngs=rngs)] if readout else []

  model = nn.from_nnx(
    lambda rngs: nn.Sequential(*LAST_LAYERS[layers](rngs), *tail(rngs))
  )
  params, state = model.init(KEY), model.initial_state(3)
  x = jax.random.normal(KEY, (5, 3, 2))
  mask = None if isinstance(step, int) else jnp.arange(5)[:, None] <= step[None]
  step = step if isinstance(step, int) else jnp.asarray(step)
  end, whole = quick(model.apply)(params, state, x, mask, KEY)
  last_end, last = quick(lambda *args: model.apply_last(*args, step))(
    params, state, x, mask, KEY
  )
  # Two programs: some releases of XLA round their sums differently.
  chex.assert_trees_all_close(last_end, end, rtol=0, atol=1e-6)
  if isinstance(whole, fptt_jax.OutputsWithPenalty):
    chex.assert_trees_all_close(last.penalty, whole.penalty, rtol=1e-6)
    whole, last = whole.outputs, last.outputs
  np.testing.assert_allclose(
    last[0], whole[step, jnp.arange(3)], rtol=0, atol=1e-6
  )  # Numbers of about 1, sums of 4 products.


def test_only_stacks_skip_steps():
  """A model of one recurrent layer has no layers to skip."""
  assert nn.from_nnx(lambda rngs: nn.LSTM(2, 4, rngs=rngs)).apply_last is None


@pytest.mark.parametrize(
  ('tail', 'expected'),
  [
    (lambda rngs: [nnx.Linear(4, 3, rngs=rngs)], 1),
    (
      lambda rngs: [nnx.Dropout(0.5), jnp.tanh, nnx.Linear(4, 3, rngs=rngs), nnx.relu],
      3,
    ),
    (
      lambda rngs: [
        nn.TemporalActivationPenalty(0.5),
        nn.LockedDropout(0.5),
        nnx.Linear(4, 3, rngs=rngs),
      ],
      1,
    ),
    (
      lambda rngs: [
        nn.MixtureOfSoftmaxes(4, nnx.Embed(3, 4, rngs=rngs), 2, dropout=0.5, rngs=rngs)
      ],
      1,
    ),
    (
      lambda rngs: [
        nnx.Linear(4, 4, rngs=rngs),
        nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)),
      ],
      0,
    ),
    (lambda rngs: [nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5)], 0),
    (lambda rngs: [nnx.Linear(4, 3, rngs=rngs), nn.LockedDropout(0.5)], 0),
  ],
  ids=[
    'linear',
    'dropout',
    'penalty',
    'mixture',
    'own stream',
    'dropout last',
    'locked last',
  ],
)
def test_readout_gives_any_steps_of_the_whole_window(tail, expected):
  """The readout is the last layers that act on each step alone, without layers that
  draw noise per window. State, penalties and outputs of `split` equal those of `apply`,
  noise included.
  """

  def build(rngs):
    return nn.Sequential(nn.GRU(2, 4, rngs=rngs), *tail(rngs))

  module = build(nnx.Rngs(0))
  assert len(module.layers) - module.readout_start == expected
  model = nn.from_nnx(build)
  if not expected:
    assert model.split is None
    return
  params, state = quick(model.init)(KEY), model.initial_state(3)
  x = jax.random.normal(KEY, (5, 3, 2))

  @quick
  def run(params):
    split_end, features = model.split.features(params, state, x, None, KEY)
    penalized = isinstance(features, fptt_jax.OutputsWithPenalty)
    some = model.split.readout(
      params, (features.outputs if penalized else features)[1:3], KEY
    )
    end, outputs = model.apply(params, state, x, None, KEY)
    parts = (
      split_end,
      fptt_jax.OutputsWithPenalty(some, features.penalty) if penalized else some,
    )
    whole = (
      end,
      outputs._replace(outputs=outputs.outputs[1:3]) if penalized else outputs[1:3],
    )
    return parts, whole

  parts, whole = run(params)
  chex.assert_trees_all_close(
    parts, whole, rtol=0, atol=1e-6
  )  # Numbers of about 1, sums of 4 products.


def low_precision_model() -> fptt_jax.Model:
  """An LSTM and a readout in bfloat16, except for the readout's bias."""
  low: dict[str, Any] = dict(param_dtype=jnp.bfloat16)

  class Readout(nnx.Linear):
    def __init__(self, *sizes: int, rngs: nnx.Rngs):
      super().__init__(*sizes, **low, dtype=jnp.bfloat16, rngs=rngs)
      self.bias = nnx.Param(jnp.zeros(sizes[-1], jnp.float32))

  return nn.from_nnx(
    lambda rngs: nn.Sequential(
      nn.LSTM(2, 8, **low, rngs=rngs), Readout(8, 3, rngs=rngs)
    )
  )


@pytest.mark.parametrize(
  ('loss', 'targets', 'settings'),
  [
    (fptt_jax.losses.terminal_classification(3), (5,), {}),
    (fptt_jax.losses.sequence_classification(3), (12, 5), {}),
    (fptt_jax.losses.sequence_classification(3), (12, 5), {'readout_chunk': 2}),
  ],
  ids=['last', 'all', 'chunks'],
)
def test_float32_params_keep_what_bfloat16_rounds_away(loss, targets, settings):
  """The first loss is the model's own. Adam steps of 1e-6 move all float32 weights and
  few bfloat16 ones. W, W̄, λ and Adam's moments are float32.
  """
  batch = fptt_jax.Batch(
    jax.random.normal(jax.random.key(1), (12, 5, 2)), jnp.zeros(targets, jnp.int32)
  )
  moved, first = [], []
  for model in (low_precision_model(), nn.with_float32_params(low_precision_model())):
    optimizer = fptt_jax.fptt(optax.adam(1e-6), alpha=0.1)
    trainer = fptt_jax.make_trainer(model, loss, optimizer, num_windows=3, **settings)
    state = trainer.init(jax.random.key(0), batch)
    before = np.array(state.params['layers'][0]['w_h'], np.float32)
    for step in range(3):
      state, metrics = trainer.step(state, batch)
      if not step:
        first.append(float(metrics.loss[0]))
    moved.append(
      np.mean(np.array(state.params['layers'][0]['w_h'], np.float32) != before)
    )
  assert first[0] == first[1]
  assert moved[0] < 0.1
  assert moved[1] == 1
  assert {
    leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim
  } == {jnp.dtype(jnp.float32)}


def test_float32_params_compute_in_the_models_dtypes():
  """Outputs and states equal the model's at the rounded weights."""
  low = low_precision_model()
  kept, x = nn.with_float32_params(low), jax.random.normal(jax.random.key(1), (6, 5, 2))
  params = jax.tree.map(lambda leaf: leaf * 1.001, kept.init(jax.random.key(0)))
  rounded = jax.tree.map(
    lambda leaf, like: leaf.astype(like.dtype), params, low.init(jax.random.key(0))
  )
  found, expected = (
    jax.jit(model.apply)(weights, model.initial_state(5), x, None, None)
    for model, weights in ((kept, params), (low, rounded))
  )
  chex.assert_trees_all_equal(found, expected)
  assert found[1].dtype == found[0][0].h.dtype == jnp.bfloat16


@dataclasses.dataclass
class Applied:
  """An `apply` that can neither be hashed nor referred to weakly."""

  model: fptt_jax.Model

  def __call__(self, *args):
    return self.model.apply(*args)


def test_float32_params_take_any_callable():
  low = low_precision_model()
  kept = nn.with_float32_params(low._replace(apply=Applied(low)))
  found = kept.apply(
    kept.init(KEY), low.initial_state(2), jnp.ones((3, 2, 2)), None, None
  )
  expected = low.apply(
    low.init(KEY), low.initial_state(2), jnp.ones((3, 2, 2)), None, None
  )
  chex.assert_trees_all_equal(found, expected)


def test_float32_params_take_models_only():
  with pytest.raises(
    TypeError,
    match=r'model .*function',
  ):
    nn.with_float32_params(lambda rngs: nn.LSTM(1, 2, rngs=rngs))
