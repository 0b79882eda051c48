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


MANY_NAME = f'{MANY} batches a program'
"""The end of the names of systems whose calls train on several batches; the times in
the tables are of one.
"""


def make_trainer(
  case: Case,
  cell: Any,
  mesh: jax.sharding.Mesh | None = None,
  whole: bool = False,
  one_buffer: bool = False,
) -> fptt_jax.Trainer:
  """`fptt_jax`'s trainer of a case.

  Args:
    case: what is trained.
    cell: (rngs) -> the recurrent layer.
    mesh: devices to split a batch over.
    whole: whether words are read out all of a window at once.
    one_buffer: whether Adam sees all parameters as one vector.
  """
  model = make_model(case, cell)
  optimizer = make_optimizer(one_buffer)
  steps = case.size if whole and case.words else None
  return fptt_jax.make_trainer(
    model,
    cases.make_loss(case),
    optimizer,
    num_windows=case.num_windows,
    mesh=mesh,
    readout_chunk=steps,
  )


def lstm_cell(case: Case, implementation: str = 'custom_vjp') -> Any:
  """The LSTM of `fptt_jax`."""
  return lambda rngs: nn.LSTM(
    case.features, case.hidden, implementation=implementation, rngs=rngs
  )


def train_step(
  case: Case, cell: Any, mesh: jax.sharding.Mesh | None = None, **settings: bool
) -> Callable[..., Any]:
  """A step of the trainer as a function of inputs and targets."""
  trainer = make_trainer(case, cell, mesh, **settings)
  state = [trainer.init(jax.random.key(0), fptt_jax.Batch(*cases.draw(case)))]

  def step(inputs: np.ndarray, targets: np.ndarray) -> Any:
    state[0], metrics = trainer.step(state[0], fptt_jax.Batch(inputs, targets))
    return jax.block_until_ready(metrics.loss)

  return step


def train_steps(
  case: Case, cell: Any, mesh: jax.sharding.Mesh | None
) -> Callable[..., Any]:
  """Steps of the trainer, `MANY` a program, all on one batch."""
  trainer = make_trainer(case, cell, mesh)
  run = fptt_jax.scan_train_steps(trainer, lambda batch, _: batch)
  state = [trainer.init(jax.random.key(0), fptt_jax.Batch(*cases.draw(case)))]

  def step(inputs: np.ndarray, targets: np.ndarray) -> Any:
    state[0], metrics = run(state[0], fptt_jax.Batch(inputs, targets), np.arange(MANY))
    return jax.block_until_ready(metrics.loss)

  return step


def choose_mesh(case: Case) -> jax.sharding.Mesh | None:
  """The devices that 'ours' splits a batch over, as the scripts do."""
  return devices.choose_meshes(
    recipe.Recipe(), case.batch_size, case.hidden, case.size
  ).batch


def make_model(case: Case, cell: Callable[[nnx.Rngs], Any]) -> fptt_jax.Model:
  """An embedding for words, the cell, a readout."""

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    embedding = (
      [nnx.Embed(case.outputs, case.features, rngs=rngs)] if case.words else []
    )
    return nn.Sequential(
      *embedding, cell(rngs), nnx.Linear(case.hidden, case.outputs, rngs=rngs)
    )

  return nn.from_nnx(build)


def make_optimizer(one_buffer: bool = False) -> optax.GradientTransformation:
  """Returns FPTT around clipped Adam, which may see all parameters as one vector."""
  base = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(LR))
  if one_buffer:
    base = optax.flatten(base)
  return fptt_jax.fptt(base, alpha=ALPHA, beta=BETA)
