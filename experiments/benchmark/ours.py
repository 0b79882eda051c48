"""Training by `fptt_jax`, as the benchmark times it."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import numpy as np
import optax

from experiments.benchmark import cases
from experiments.benchmark.cases import ALPHA, BETA, CLIP, LR, Case
from experiments.core import devices, recipe
import fptt_jax
from fptt_jax import nn

MANY = 4
"""Number of batches per call of the systems that train on several batches."""


MANY_NAME = f'{MANY} batches a program'
"""End of the names of systems whose calls train on several batches.

The tables have the time per batch of these systems, too.
"""


def make_trainer(
  case: Case,
  model: fptt_jax.Model,
  mesh: jax.sharding.Mesh | None = None,
  whole: bool = False,
  one_buffer: bool = False,
) -> fptt_jax.Trainer:
  """Return `fptt_jax`'s trainer of a case.

  Args:
    case: the shapes and the loss.
    model: the model, such as that of :func:`make_model`.
    mesh: devices to split a batch over.
    whole: whether the logits of all words of a window are computed at once.
    one_buffer: whether Adam sees all parameters as one vector.
  """
  readout_chunk = case.size if whole and case.words else None
  return fptt_jax.make_trainer(
    model,
    cases.make_loss(case),
    make_optimizer(one_buffer),
    num_windows=case.num_windows,
    mesh=mesh,
    readout_chunk=readout_chunk,
  )


def lstm(case: Case, **settings: Any) -> fptt_jax.Model:
  """Return the model of a case with the LSTM of `fptt_jax`.

  Args:
    case: the shapes.
    **settings: further settings of `nn.LSTM`.
  """
  return make_model(
    case, lambda rngs: nn.LSTM(case.features, case.hidden, rngs=rngs, **settings)
  )


def train_step(
  case: Case,
  model: fptt_jax.Model,
  mesh: jax.sharding.Mesh | None = None,
  **settings: bool,
) -> Callable[..., Any]:
  """Return a train step as a function of inputs and targets.

  The state stays inside. The step returns the losses of the windows when they are
  computed.

  Args:
    case: the shapes and the loss.
    model: the model.
    mesh: devices to split a batch over.
    **settings: `whole` and `one_buffer` of :func:`make_trainer`.
  """
  trainer = make_trainer(case, model, mesh, **settings)
  state = trainer.init(jax.random.key(0), fptt_jax.Batch(*cases.draw(case)))

  def step(inputs: np.ndarray, targets: np.ndarray) -> Any:
    nonlocal state
    state, metrics = trainer.step(state, fptt_jax.Batch(inputs, targets))
    # JAX returns before the work is done; the clock must not stop that early.
    return jax.block_until_ready(metrics.loss)

  return step


def train_steps(
  case: Case, model: fptt_jax.Model, mesh: jax.sharding.Mesh | None
) -> Callable[..., Any]:
  """Return a function that trains :data:`MANY` times on a batch in one program.

  Args:
    case: the shapes and the loss.
    model: the model.
    mesh: devices to split a batch over.
  """
  trainer = make_trainer(case, model, mesh)
  run = fptt_jax.scan_train_steps(trainer, lambda batch, _: batch)
  state = trainer.init(jax.random.key(0), fptt_jax.Batch(*cases.draw(case)))

  def step(inputs: np.ndarray, targets: np.ndarray) -> Any:
    nonlocal state
    state, metrics = run(state, fptt_jax.Batch(inputs, targets), np.arange(MANY))
    return jax.block_until_ready(metrics.loss)

  return step


def choose_mesh(case: Case) -> jax.sharding.Mesh | None:
  """Return the devices that 'ours' splits a batch over, as the scripts do."""
  meshes = devices.choose_meshes(
    recipe.Recipe(), case.batch_size, case.hidden, case.size
  )
  return meshes.batch


def make_model(case: Case, cell: Callable[[nnx.Rngs], Any]) -> fptt_jax.Model:
  """Return a model of an embedding for words, the cell and a readout.

  Args:
    case: the shapes.
    cell: (rngs) -> the recurrent layer, of this library or of flax.
  """

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    embedding = (
      [nnx.Embed(case.outputs, case.features, rngs=rngs)] if case.words else []
    )
    # Built in this order, in which the random streams are drawn from.
    layer = cell(rngs)
    readout = nnx.Linear(case.hidden, case.outputs, rngs=rngs)
    return nn.Sequential(*embedding, layer, readout)

  return nn.from_nnx(build)


def make_optimizer(one_buffer: bool = False) -> optax.GradientTransformation:
  """Return FPTT around Adam with a clipped gradient.

  Args:
    one_buffer: whether Adam sees all parameters as one vector.
  """
  base = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(LR))
  if one_buffer:
    base = optax.flatten(base)
  return fptt_jax.fptt(base, alpha=ALPHA, beta=BETA)
