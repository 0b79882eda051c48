"""The hand-written backward pass equals the plain scan of the same layer."""

import functools
import re

from flax import nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import nn
from fptt_jax.nn._fused import COLUMNS, ROWS, choose_axis, steps_per_chunk

H = 6
LAYERS = {
  'LSTM': nn.LSTM,
  'GRU': nn.GRU,
  'GRU one bias': functools.partial(nn.GRU, recurrent_bias=False),
  'RNN': nn.ElmanRNN,
  'AntisymmetricRNN': functools.partial(nn.AntisymmetricRNN, epsilon=0.3),
  'IndRNN': nn.IndRNN,
  'IndRNN limited': functools.partial(
    nn.IndRNN, max_weight=0.5, initial_range=(-0.5, 0.5)
  ),
  'LRU': nn.LRU,
  'LRU wide': functools.partial(nn.LRU, state_features=9),
}


def model(layer, features, implementation, dtype=jnp.float64):
  return nn.from_nnx(
    lambda rngs: LAYERS[layer](
      features, H, implementation=implementation, param_dtype=dtype, rngs=rngs
    )
  )


def value_and_gradients(layer, implementation, shape, masked, dtype=jnp.float64):
  """Return a function of all of a window's results and its gradients in weights,
  initial state and inputs. Masked outputs, which are undefined, are left out.
  """
  run, (size, batch_size, features) = (
    model(layer, features=shape[2], implementation=implementation, dtype=dtype),
    shape,
  )

  def draw(seed, *shape):
    # By NumPy, since JAX would compile a program for each shape.
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)

  params = run.init(jax.random.key(0))
  state = jax.tree.map(
    lambda leaf: draw(1, *leaf.shape) / 2, run.initial_state(batch_size)
  )
  valid = np.random.default_rng(2).random((size, batch_size)) < 0.6
  mask = jnp.asarray(valid) if masked else None
  weights = draw(3, size, batch_size, H)

  @helpers.quick
  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
  def total(params, state, x):
    end, y = run.apply(params, state, x, mask, None)
    kept = y if mask is None else jnp.where(mask[..., None], y, 0)
    return jnp.sum(weights * kept) + sum(
      jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(end)
    )

  return total(params, state, draw(4, size, batch_size, features))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  ('axis', 'shape', 'masked', 'steps'),
  [
    (ROWS, (12, 3, 2), False, 12),
    (ROWS, (4, 70, 7), True, 2),
    (ROWS, (24, 13, 7), True, 12),
    (ROWS, (3, 130, 7), True, 1),
    (COLUMNS, (7, 64, 7), True, 7),
    (COLUMNS, (4, 64, 7), True, 2),
    (COLUMNS, (4, 64, 2), False, 2),
    (COLUMNS, (3, 128, 7), True, 1),
  ],
)
@pytest.mark.parametrize('layer', LAYERS)
def test_fused_equals_the_scan(layer, axis, shape, masked, steps):
  """Values and gradients are equal in float64, for few and many features, all chunk
  sizes, and masks with holes.
  """
  assert choose_axis(shape[1], H) == axis
  assert steps_per_chunk(*shape[:2]) == steps
  expected = value_and_gradients(layer, 'scan', shape, masked)
  helpers.assert_close(
    value_and_gradients(layer, 'custom_vjp', shape, masked), expected, 1e-12
  )


@pytest.mark.parametrize('batch_size', [16, 64], ids=['rows', 'columns'])
@pytest.mark.parametrize('layer', LAYERS)
def test_fused_in_float32_is_as_good_as_the_scan(layer, batch_size):
  """In float32 both differ by rounding only: 12 steps of sums of about 20 products,
  each to 6e-8, for gradients of as many sequences.
  """
  shape = (12, batch_size, 7)
  expected = value_and_gradients(layer, 'scan', shape, False, jnp.float32)
  helpers.assert_close(
    value_and_gradients(layer, 'custom_vjp', shape, False, jnp.float32), expected, 2e-5
  )


@pytest.mark.parametrize('batch_size', [16, 64], ids=['rows', 'columns'])
@pytest.mark.parametrize('layer', [layer for layer in LAYERS if 'LRU' not in layer])
def test_fused_in_bfloat16_sums_in_float32(layer, batch_size):
  """In bfloat16 the result is at most 1.5 times as far from the float32 result of the
  same numbers as the scan's is.
  """
  shape = (12, batch_size, 7)
  weights = jax.tree.map(
    lambda x: x.astype(jnp.float32),
    model(layer, 7, 'custom_vjp', jnp.bfloat16).init(jax.random.key(0)),
  )
  x = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)

  def gradients(dtype, implementation):
    run = model(layer, 7, implementation, dtype)

    def total(params):
      return jnp.sum(
        run.apply(params, run.initial_state(batch_size), x.astype(dtype), None, None)[
          1
        ].astype(jnp.float32)
        ** 2
      )

    return helpers.quick(jax.grad(total))(
      jax.tree.map(lambda w: w.astype(dtype), weights)
    )

  exact = gradients(jnp.float32, 'scan')

  def distance(tree):
    return np.sqrt(
      sum(
        np.sum((np.asarray(a, np.float64) - b) ** 2)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(exact), strict=True)
      )
    )

  scan, fused = (
    distance(gradients(jnp.bfloat16, 'scan')),
    distance(gradients(jnp.bfloat16, 'custom_vjp')),
  )
  assert fused <= 1.5 * scan
  assert fused <= 0.02 * np.sqrt(
    sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(exact))
  )


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('batch_size', [4, 64], ids=['rows', 'columns'])
@pytest.mark.parametrize('layer', LAYERS)
def test_fused_under_vmap(layer, batch_size):
  """Values agree under vmap over models and data, as populations are trained."""
  runs = [model(layer, 2, choice) for choice in ('custom_vjp', 'scan')]
  params = jax.vmap(runs[0].init)(jax.random.split(jax.random.key(0), 3))
  x = jax.random.normal(jax.random.key(1), (3, 5, batch_size, 2))

  def gradients(run):
    def total(params, x):
      return jnp.sum(
        jnp.sin(run.apply(params, run.initial_state(batch_size), x, None, None)[1])
      )

    return helpers.quick(jax.vmap(jax.grad(total)))(params, x)

  helpers.assert_close(gradients(runs[0]), gradients(runs[1]), 1e-12)


def test_plain_scan_can_be_differentiated_forward():
  """`implementation='scan'` supports jvp and second derivatives."""
  x = jnp.ones((3, 2, 2))

  def outputs(implementation):
    run = model('LSTM', 2, implementation, jnp.float32)
    params = run.init(jax.random.key(0))
    return jax.jvp(
      lambda p: run.apply(p, run.initial_state(2), x, None, None)[1],
      (params,),
      (params,),
    )[1]

  assert np.isfinite(outputs('scan')).all()
  with pytest.raises(TypeError, match='forward-mode'):
    outputs('custom_vjp')


@pytest.mark.parametrize(
  ('num_steps', 'batch_size', 'expected'),
  [
    (28, 128, 1),
    (28, 64, 2),
    (28, 32, 4),
    (28, 8, 28),
    (28, 1, 28),
    (7, 64, 7),
    (7, 16, 7),
    (1, 1, 1),
    (53, 64, 1),
    (997, 8, 997),
  ],
)
def test_steps_per_chunk(num_steps, batch_size, expected):
  """The result is the smallest divisor of S that gives 128 to 1,024 columns, else 64,
  else S.
  """
  assert steps_per_chunk(num_steps, batch_size) == expected


@pytest.mark.parametrize(
  ('batch_size', 'hidden', 'expected'),
  [
    (64, 128, COLUMNS),
    (128, 16, COLUMNS),
    (50, 256, ROWS),
    (100, 128, ROWS),
    (32, 128, ROWS),
    (20, 1024, COLUMNS),
    (1, 1000, ROWS),
  ],
)
def test_choose_axis(batch_size, hidden, expected):
  """Columns serve batches of 64 or more that 16 divides, and 1,024 units or more."""
  assert choose_axis(batch_size, hidden) == expected


def compiled_step(num_steps, num_windows, features=1, batch_size=64, **options):
  """Compile a train step of an LSTM of 128 units."""
  run = nn.from_nnx(
    lambda rngs: nn.Sequential(
      nn.LSTM(features, 128, implementation='custom_vjp', rngs=rngs),
      nnx.Linear(128, 10, rngs=rngs),
    )
  )
  loss, tx = (
    fptt_jax.losses.terminal_classification(10, divergence='none'),
    fptt_jax.fptt(optax.adam(1e-3)),
  )
  trainer = fptt_jax.make_trainer(run, loss, tx, num_windows=num_windows, **options)
  shapes = (
    jax.ShapeDtypeStruct((num_steps, batch_size, features), jnp.float32),
    jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  )
  batch = fptt_jax.Batch(*shapes)
  return helpers.optimized(
    trainer.step.lower(jax.eval_shape(trainer.init, jax.random.key(0), batch), batch)
  )


def temporary_bytes(*args, **options):
  return compiled_step(*args, **options).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
  ('features', 'expected', 'batch_size'), [(1, 7.05, 60), (128, 8.05, 64)]
)
def test_lstm_keeps_seven_numbers_a_unit_and_step(features, expected, batch_size):
  """A window's memory grows by 7·B·H floats per step: five factors, f and the output
  before. Inputs with many features are sliced from the batch.
  """
  small, large = (
    temporary_bytes(128, windows, features, batch_size) for windows in (4, 2)
  )
  assert (large - small) / (32 * batch_size * 128 * 4) <= expected


def test_memory_falls_with_the_windows():
  """For pixel MNIST, K = 28 takes 25 times less memory than BPTT and K = 112 80 times
  less. Windows of 16 steps take no more in longer sequences.
  """
  whole, *parts = (
    temporary_bytes(784, windows, batch_size=128) for windows in (1, 28, 112)
  )
  assert whole >= 25 * parts[0]
  assert whole >= 80 * parts[1]
  short, long = (
    temporary_bytes(num_steps, num_steps // 16) for num_steps in (256, 16_384)
  )
  assert long <= 1.02 * short


@pytest.mark.parametrize('layer', [nn.LSTM, nn.GRU, nn.ElmanRNN])
@pytest.mark.parametrize('wrap', ['jit', 'checkpoint', 'scan'])
@pytest.mark.filterwarnings("ignore:products='bfloat16' is slower")
def test_a_differentiated_program_rounds_forward_too(layer, wrap):
  """JAX traces the forward pass later there, which must round its products all the
  same.
  """
  run = layer(8, 24, products='bfloat16', implementation='custom_vjp', rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (5, 3, 8))
  state = run.initial_state(3)

  def outputs(x):
    return run(state, x)[1]

  def scanned(x):
    return jax.lax.scan(lambda carry, x: (carry, outputs(x)), (), x[None])[1][0]

  wrapped = {'jit': jax.jit, 'checkpoint': jax.checkpoint, 'scan': lambda _: scanned}
  # The value that a gradient computes, and its value alone.
  found, _ = jax.vjp(wrapped[wrap](outputs), x)
  expected = jax.jit(outputs)(x)
  exact = layer(8, 24, implementation='custom_vjp', rngs=nnx.Rngs(0))(state, x)[1]
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
  assert jnp.abs(expected - exact).max() > 1e-4


def test_products_in_the_compiled_loops():
  """Per step there is one product forward. Backward, two steps take two for dh and one
  for the weights.
  """
  text = compiled_step(56, 2).as_text()
  bodies = re.findall(r'^%?[\w.-]+ \(.*?^}', text, re.M | re.S)
  products = {
    body.split(' ', 1)[0]: len(re.findall(r'= \S+ dot\(', body)) for body in bodies
  }
  calls = {
    body.split(' ', 1)[0]: re.findall(r'calls=(%?[\w.-]+)', body) for body in bodies
  }
  loops = re.findall(r'body=(%?[\w.-]+)', text)
  counts = sorted(
    products[name] + sum(products.get(called, 0) for called in calls[name])
    for name in loops
  )
  assert counts == [
    1,
    3,
    3,
  ]  # The third is the loop over windows: the readout's, forward and twice backward.


@pytest.mark.parametrize(('skip_nonfinite', 'passes'), [(False, 8), (True, 12)])
def test_update_in_the_compiled_windows(skip_nonfinite, passes):
  """The loop over windows copies no parameter of the layer and updates each in five
  passes: Adam's two moments, W, λ and W̄. (On a CPU a fusion writes one array. Three
  more scale and transpose the window's weights and zero their gradient.) Skipping
  nonfinite updates takes at most one more pass for each of the five.
  """
  text = compiled_step(56, 2, skip_nonfinite=skip_nonfinite).as_text()
  bodies = {
    body.split(' ', 1)[0]: body
    for body in re.findall(r'^%?[\w.-]+ \(.*?^}', text, re.M | re.S)
  }
  windows = max(
    (bodies[name] for name in re.findall(r'body=(%?[\w.-]+)', text)), key=len
  )
  assert not re.findall(r'= f32\[(?:128,512|1,512|512)\]\S* copy\(', windows)
  assert (
    len(
      re.findall(
        r'= f32\[(?:128,512|512,128)\]\S* (?:fusion|copy|transpose)\(', windows
      )
    )
    <= passes
  )
