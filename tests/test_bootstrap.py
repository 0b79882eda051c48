"""Targets of early windows that mix in what a mean of the weights predicts later."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
from helpers import lstm, quick, regression_batch
from interruption import assert_same_runs, interrupted_at
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import add_task, images, language_model, online
from experiments.core import bootstrap
from experiments.core.averaging import running_mean
import fptt_jax


def summing_model(weights: tuple[float, ...]) -> fptt_jax.Model:
  """A model whose outputs are the sum of the inputs so far, times each weight."""

  def apply(
    params: jax.Array, state: jax.Array, x: jax.Array, mask: Any, key: Any
  ) -> tuple[jax.Array, jax.Array]:
    sums = state[None] + jnp.cumsum(x, axis=0)
    return sums[-1], sums * params

  return fptt_jax.Model(
    init=lambda key: jnp.array([[weights]]),
    initial_state=lambda batch_size: jnp.zeros((batch_size, 1)),
    apply=apply,
  )


def make(
  model: fptt_jax.Model, loss: fptt_jax.Loss, share: float | None, **options: Any
) -> fptt_jax.Trainer:
  """A trainer with the mean of the weights, bootstrapped if there is a share."""
  optimizer = running_mean(optax.sgd(0.01, momentum=0.5), horizon=2)
  if share is None:
    return fptt_jax.make_trainer(model, loss, optimizer, **options)
  trainer = fptt_jax.make_trainer(
    model, bootstrap.with_window_targets(loss), optimizer, **options
  )
  plan = fptt_jax.make_windows(7, num_windows=options['num_windows'])
  return bootstrap.bootstrapped(trainer, plan, lambda count: jnp.asarray(share))


@pytest.mark.parametrize('classes', [False, True])
def test_without_a_share_nothing_changes(classes: bool) -> None:
  """Windows of unequal length, two steps: the same weights and metrics, also of an
  evaluation; with a share others.
  """
  batch = regression_batch(7, 4)
  loss = fptt_jax.losses.terminal_regression()
  if classes:
    batch = batch._replace(targets=jnp.array([0, 2, 1, 1]))
    loss = fptt_jax.losses.terminal_classification(3, divergence='none')
  model = lstm(out=3 if classes else 1)
  ended = []
  for share in (None, 0.0, 0.9):
    trainer = make(model, loss, share, method='tbptt', num_windows=3, donate=False)
    state = trainer.init(jax.random.key(0), batch)
    for _ in range(2):
      state, metrics = trainer.step(state, batch)
    ended.append((state.params, metrics.totals, trainer.evaluate(state.params, batch)))
  chex.assert_trees_all_equal(ended[0], ended[1])
  changes = optax.tree.sub(ended[0][0], ended[2][0])
  assert optax.tree.norm(changes) > 1e-4


def test_two_windows_by_hand() -> None:
  """Inputs 1, 2, 3, 4, weight 2 and target 7: the first window ends at the output 6,
  and the mean predicts 20, so that with half of it the target is 13.5; beta = 1/2.
  """
  loss = bootstrap.with_window_targets(fptt_jax.losses.terminal_regression())
  trainer = fptt_jax.make_trainer(
    summing_model((2.0,)),
    loss,
    running_mean(optax.sgd(0.01), horizon=10),
    method='tbptt',
    num_windows=2,
  )
  plan = fptt_jax.make_windows(4, num_windows=2)
  trainer = bootstrap.bootstrapped(trainer, plan, lambda count: 0.5 + 0 * count)
  inputs = jnp.array([1.0, 2.0, 3.0, 4.0])[:, None, None]
  batch = fptt_jax.Batch(inputs, jnp.array([7.0]))
  state = trainer.init(jax.random.key(0), batch)
  weight, mean = 2.0, 2.0
  count = 0
  for _ in range(3):
    state, metrics = trainer.step(state, batch)
    target = 0.5 * 7 + 0.5 * mean * 10
    expected = []
    for beta, total, wanted in ((0.5, 3.0, target), (1.0, 10.0, 7.0)):
      error = weight * total - wanted
      expected.append(beta * error**2)
      weight -= 0.01 * beta * 2 * error * total
      count += 1
      mean += (weight - mean) / count
    np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(state.params, [[[weight]]], rtol=1e-5)
  # Metrics are of the sequence's own target.
  assert metrics.totals['loss'] == pytest.approx(expected[1], rel=1e-5)


def test_probabilities_of_classes_are_mixed() -> None:
  """In NumPy: the cross-entropy of the first window against a mixture."""
  loss = bootstrap.with_window_targets(
    fptt_jax.losses.terminal_classification(2, divergence='none')
  )
  weights = np.array([0.3, -0.2])
  trainer = fptt_jax.make_trainer(
    summing_model((0.3, -0.2)),
    loss,
    running_mean(optax.sgd(0.01), horizon=10),
    method='tbptt',
    num_windows=2,
  )
  plan = fptt_jax.make_windows(4, num_windows=2)
  trainer = bootstrap.bootstrapped(trainer, plan, lambda count: 0.25 + 0 * count)
  inputs = jnp.array([1.0, 2.0, 3.0, 4.0])[:, None, None]
  batch = fptt_jax.Batch(inputs, jnp.array([1]))
  state = trainer.init(jax.random.key(0), batch)
  _, metrics = trainer.step(state, batch)

  def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()

  wanted = 0.75 * np.array([0, 1]) + 0.25 * softmax(10 * weights)
  expected = -0.5 * (wanted * np.log(softmax(3 * weights))).sum()
  np.testing.assert_allclose(metrics.loss[0], expected, rtol=1e-5)


TINY: dict[str, Any] = dict(
  method=('tbptt',),
  bootstrap=0.9,
  average_horizon=6,
  seq_len=12,
  num_windows=3,
  hidden=4,
  batch_size=4,
  batches=6,
  eval_every=2,
)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
  """The share and the mean go on as well; without a share the losses are others."""
  config = add_task.Config(test_size=16, lr=0.1, momentum=0.9, seeds=(0, 1), **TINY)
  _, whole = add_task.run(config, str(tmp_path / 'whole'))
  with interrupted_at(3):
    add_task.run(config, str(tmp_path / 'cut'))
  _, cut = add_task.run(config, str(tmp_path / 'cut'))
  assert_same_runs(tmp_path, whole, cut)
  plain = dataclasses.replace(config, bootstrap=0.0)
  _, without = add_task.run(plain, str(tmp_path / 'plain'))
  for one, other in zip(whole, without, strict=True):
    assert one['test_mse'] != other['test_mse']


@pytest.mark.parametrize('share', [0.0, 0.9])
def test_a_recall_can_have_its_target_in_every_window(
  tmp_path: Path, share: float
) -> None:
  """With and without a share of a prediction; the loss of early windows counts."""
  settings = TINY | dict(bootstrap=share)
  config = online.Config(task='recall', every_window=True, test_steps=20, **settings)
  _, [summary] = online.run(config, str(tmp_path))
  assert np.isfinite(summary['test_recall'])
  trainer, _ = online.make_trainer(config, 'tbptt', 1)
  item = {name: leaf[0] for name, leaf in online.draw_items(config, 0, 0, 1).items()}
  batch = online.read_batch(config, item)
  state = trainer.init(jax.random.key(0), batch)
  _, metrics = quick(trainer.step)(state, batch)
  assert np.all(metrics.loss > 0)


def test_refused_where_early_windows_have_no_target() -> None:
  with pytest.raises(ValueError, match='--bootstrap must be 0'):
    add_task.Config(method=('bptt',), bootstrap=0.9)
  with pytest.raises(ValueError, match='--bootstrap must be 0'):
    images.Config(method=('tbptt',), bootstrap=0.9)
  with pytest.raises(ValueError, match='--bootstrap must be 0'):
    online.Config(task='recall', bootstrap=0.9)
  with pytest.raises(ValueError, match='--bootstrap must be 0'):
    language_model.Config(task='ptb300', bootstrap=0.9)
  with pytest.raises(ValueError, match='--every_window must be false'):
    online.Config(task='lags', every_window=True)
