"""Small models, batches and gradients for the tests of credit across windows."""

import functools
from typing import Any

from flax import nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fptt_jax
from fptt_jax import influence, losses, nn

T, B, H = 6, 2, 3
LENGTHS = np.array([6, 4], np.int32)
SERIES = losses.sequence_regression()


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


@functools.cache
def elman() -> fptt_jax.Model:
  """One model for many tests, which is probed and compiled once."""
  return helpers.elman(hidden=H, dtype=jnp.float64)


@functools.cache
def whole_elman_gradient(num_steps: int = T, num_windows: int = 3) -> Any:
  """Its gradient by back-propagation through time, of the sum of windows' losses."""
  options = dict(num_windows=num_windows)
  return total_gradient(elman(), [batch_of(num_steps)], 'bptt_aux', **options)[0]


def batch_of(num_steps: int = T, seed: int = 0) -> fptt_jax.Batch:
  return helpers.series_batch(num_steps, B, seed=seed, dtype=np.float64)


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
  trainer = helpers.quick_trainer(model, loss, optimizer, method=method, **options)
  state = trainer.init(jax.random.key(0), batches[0])
  for batch in batches:
    state, metrics = trainer.step(state, batch)
  return state.opt_state, metrics


def assert_close(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
  helpers.assert_close(got, expected, tolerance, least=1e-12)


def distance(got: Any, expected: Any) -> float:
  """The norm of the difference, relative to that of what is expected."""
  difference = jax.tree.map(jnp.subtract, got, expected)
  return float(optax.tree.norm(difference) / optax.tree.norm(expected))


def first_window(model: fptt_jax.Model, batch: fptt_jax.Batch, steps: slice) -> Any:
  """The map of some steps of a batch."""

  def run(params, hidden, x, mask):
    apply = model.apply if model.plain is None else model.plain
    return apply(params, hidden, x, mask, None)[0]

  x = jnp.asarray(batch.inputs[steps])
  own = model.own_steps
  return influence.WindowMap(run, x, None, own_steps=own, first_params=model.init)
