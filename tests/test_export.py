"""`jax.export` gives one program for every batch size and number of steps."""

from collections.abc import Callable
from typing import Any

from flax import linen, nnx
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import nn

KEY = jax.random.key(0)
LAYERS = {
  'FastGRNN': nn.FastGRNN,
  'IncrementalRNN': nn.IncrementalRNN,
  'IndRNN': nn.IndRNN,
  'LRU': nn.LRU,
  'LSTM': nn.LSTM,
  'GRU': nn.GRU,
  'RNN': nn.ElmanRNN,
  'AntisymmetricRNN': nn.AntisymmetricRNN,
  'nnx.OptimizedLSTMCell': nnx.OptimizedLSTMCell,
}


def of_layer(layer: type) -> fptt_jax.Model:
  return nn.from_nnx(lambda rngs: layer(2, 5, rngs=rngs))


def awd(rngs: nnx.Rngs) -> nn.Sequential:
  """Returns a language model with every kind of noise and a tied mixture of
  softmaxes.
  """
  embed = nnx.Embed(11, 4, rngs=rngs)
  return nn.Sequential(
    nn.EmbeddingDropout(embed, 0.1),
    nn.WeightDrop(nn.LSTM(4, 4, rngs=rngs), 0.2),
    nn.TemporalActivationPenalty(1.0),
    nn.LockedDropout(0.2),
    nn.MixtureOfSoftmaxes(4, embed, 2, dropout=0.1, rngs=rngs),
  )


def outputs(model: fptt_jax.Model) -> Callable[..., jax.Array]:
  """Returns the model's outputs as a function of parameters, inputs, mask and key."""

  def run(params: Any, x: jax.Array, mask: Any = None, key: Any = None) -> jax.Array:
    y = model.apply(params, model.initial_state(x.shape[1]), x, mask, key)[1]
    return y.outputs if isinstance(y, fptt_jax.OutputsWithPenalty) else y

  return run


def like(tree: Any) -> Any:
  return jax.eval_shape(lambda: tree)


@pytest.mark.parametrize('name', LAYERS)
def test_outputs_for_any_batch_size(name: str) -> None:
  """Sizes on both sides of the layout's threshold give the same outputs as without
  export.
  """
  model = of_layer(LAYERS[name])
  params, run = model.init(KEY), jax.jit(outputs(model))
  (batch_size,) = export.symbolic_shape('b')
  exported = export.export(run)(
    like(params), jax.ShapeDtypeStruct((7, batch_size, 2), jnp.float32)
  )
  for size in (1, 64):
    x = jax.random.normal(KEY, (7, size, 2))
    np.testing.assert_allclose(exported.call(params, x), run(params, x), atol=1e-6)


@pytest.mark.parametrize('name', ['LSTM', 'LRU'])
def test_gradient_for_any_number_of_steps_and_any_mask(name: str) -> None:
  """The backward pass supports a symbolic size and any mask."""
  model = of_layer(LAYERS[name])
  params, run = model.init(KEY), outputs(model)
  gradient = jax.jit(
    jax.grad(lambda params, x, mask: jnp.square(run(params, x, mask)).sum())
  )
  steps, size = export.symbolic_shape('s, b')
  arguments = (
    jax.ShapeDtypeStruct((steps, size, 2), jnp.float32),
    jax.ShapeDtypeStruct((steps, size), bool),
  )
  exported = export.export(gradient)(like(params), *arguments)
  x, mask = (
    jax.random.normal(KEY, (9, 3, 2)),
    jnp.arange(9)[:, None] < jnp.array([[9, 4, 1]]),
  )
  expected = gradient(params, x, mask)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    exported.call(params, x, mask),
    expected,
  )


def test_language_model_in_training() -> None:
  """Noise, penalties and the tied mixture are equal for a symbolic size."""
  model = nn.from_nnx(awd)
  params, run = model.init(KEY), jax.jit(outputs(model))
  steps, size = export.symbolic_shape('s, b')
  arguments = (
    jax.ShapeDtypeStruct((steps, size), jnp.int32),
    jax.ShapeDtypeStruct((steps, size), bool),
  )
  exported = export.export(run)(like(params), *arguments, like(KEY))
  tokens, mask = jnp.arange(12).reshape(4, 3) % 11, jnp.ones((4, 3), bool)
  np.testing.assert_allclose(
    exported.call(params, tokens, mask, KEY), run(params, tokens, mask, KEY), atol=1e-5
  )


def test_linen_cell() -> None:
  """A Linen cell is exported as well."""
  model = nn.from_linen(linen.GRUCell(5), (2,))
  params, run = model.init(KEY), jax.jit(outputs(model))
  steps, size = export.symbolic_shape('s, b')
  exported = export.export(run)(
    like(params), jax.ShapeDtypeStruct((steps, size, 2), jnp.float32)
  )
  x = jax.random.normal(KEY, (3, 2, 2))
  np.testing.assert_allclose(exported.call(params, x), run(params, x), atol=1e-6)


def test_evaluation_and_training_step() -> None:
  """The trainer's own functions can be exported for any number of sequences."""
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(nn.GRU(1, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))
  )
  loss = fptt_jax.losses.terminal_classification(2)
  trainer = fptt_jax.make_trainer(
    model, loss, fptt_jax.fptt(optax.sgd(0.1)), num_windows=2
  )
  (size,) = export.symbolic_shape('b')
  batch = fptt_jax.Batch(
    jax.ShapeDtypeStruct((6, size, 1), jnp.float32),
    jax.ShapeDtypeStruct((size,), jnp.int32),
  )
  concrete = fptt_jax.Batch(
    jax.random.normal(KEY, (6, 5, 1)), jnp.array([0, 1, 1, 0, 1])
  )
  state = trainer.init(KEY, concrete)

  evaluate = export.export(trainer.evaluate)(like(state.params), batch)
  totals, _ = trainer.evaluate(state.params, concrete)
  got, _ = evaluate.call(state.params, concrete)
  assert got.keys() == totals.keys()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, totals)

  abstract_state = jax.eval_shape(trainer.init, KEY, batch)
  step = export.export(trainer.step)(abstract_state, batch)
  _, got_metrics = step.call(jax.tree.map(jnp.copy, state), concrete)
  _, metrics = trainer.step(state, concrete)
  np.testing.assert_allclose(got_metrics.loss, metrics.loss, rtol=1e-6)
