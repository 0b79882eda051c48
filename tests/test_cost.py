"""Measuring costs: what is timed is what it says, what is counted is right."""

from pathlib import Path
from typing import Any

import helpers
import jax
import numpy as np
import optax
import pytest

from experiments import add_task
from experiments.benchmark import cost
import fptt_jax


class Clock:
  """A clock that stands still but for what the programs that are timed do."""

  def __init__(self) -> None:
    self.now = 0.0

  def perf_counter(self) -> float:
    return self.now

  def spend(self, seconds: float, x: jax.Array) -> jax.Array:
    """`x` [], after `seconds` of work, which the compiler leaves out where `x` is not
    used.
    """

    def advance(value: np.ndarray) -> np.ndarray:
      self.now += seconds
      return np.asarray(value)

    return jax.pure_callback(advance, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_time_goes_to_what_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
  """A backward pass of 2 s is the gradient's time (so the gradient is not left out as
  unused), an update of 3 s the update's.
  """
  clock = Clock()
  monkeypatch.setattr(cost, 'time', clock)

  @jax.custom_vjp
  def slow_backward(x: jax.Array) -> jax.Array:
    return x

  slow_backward.defvjp(
    lambda x: (x, None), lambda _, g: (g + 0 * clock.spend(2.0, g.sum()),)
  )

  def slow_update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    pause = 0 * clock.spend(3.0, optax.tree.norm(grads))
    return jax.tree.map(lambda g: -0.1 * g + pause, grads), state

  model = helpers.elman(hidden=2)
  slow = model._replace(
    apply=lambda p, h, x, mask, key: model.apply(
      {**p, 'b': slow_backward(p['b'])}, h, x, mask, key
    )
  )
  optimizer = optax.GradientTransformation(lambda params: (), slow_update)
  loss, batch = fptt_jax.losses.terminal_regression(), helpers.regression_batch(4, 2)
  costs = cost.measure(
    slow, loss, lambda method: optimizer, 'bptt', batch, num_windows=None, repeats=3
  )
  assert (costs['gradient_ms'], costs['update_ms'], costs['± update_ms']) == (
    2000.0,
    3000.0,
    0.0,
  )


def measure_with_times(
  monkeypatch: pytest.MonkeyPatch, seconds: list[tuple[float, float]], batches: int = 1
) -> dict[str, Any]:
  """`cost.measure`, where calls without and with the update take these seconds, warm-up
  first.
  """
  times = iter(np.ravel(seconds))
  monkeypatch.setattr(
    cost, 'timed_step', lambda step, state, batch: (next(times), *step(state, batch))
  )
  model, loss, batch = (
    helpers.elman(hidden=2),
    fptt_jax.losses.terminal_regression(),
    helpers.regression_batch(4, 2),
  )
  return cost.measure(
    model,
    loss,
    lambda method: optax.sgd(0.1),
    'bptt',
    batch,
    num_windows=None,
    repeats=len(seconds) - 1,
    batches=batches,
  )


def test_updates_time_has_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
  """The median of the differences, not the difference of medians: 1, 2, 3, 4, 60 ms.
  Their median deviation is 1, so a standard deviation of 1.4826, a standard error of
  the median of 1.4826 (π / 10)^½, and 1.96 of those.
  """
  pairs = [
    (9.0, 9.0),
    (0.1, 0.101),
    (0.2, 0.202),
    (0.3, 0.303),
    (0.4, 0.404),
    (0.5, 0.56),
  ]
  costs = measure_with_times(monkeypatch, pairs)
  assert costs['gradient_ms'] == pytest.approx(300)
  assert costs['update_ms'] == pytest.approx(3)
  assert costs['± update_ms'] == pytest.approx(
    1.959964 * 1.482602 * (np.pi / 10) ** 0.5, rel=1e-5
  )
  assert measure_with_times(monkeypatch, pairs[:2])['± update_ms'] is None


def test_batches_of_one_program_share_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
  """Of four batches in 0.4 s one takes 100 ms, and it is one batch's updates that are
  counted.
  """
  costs = measure_with_times(monkeypatch, [(1.0, 1.0), (0.4, 0.44)], batches=4)
  assert (costs['gradient_ms'], costs['update_ms']) == (
    pytest.approx(100),
    pytest.approx(10),
  )
  assert costs['updates'] == 1


def test_memory_and_updates_are_the_trainers() -> None:
  """Bytes are those of the method's own step, which updates K times a batch."""
  model, loss, batch = (
    helpers.elman(hidden=2),
    fptt_jax.losses.terminal_regression(),
    helpers.regression_batch(6, 2),
  )
  costs = cost.measure(
    model, loss, lambda method: optax.adam(0.1), 'ftrl', batch, num_windows=3, repeats=1
  )
  trainer = fptt_jax.make_trainer(
    model, loss, optax.adam(0.1), method='ftrl', num_windows=3
  )
  state = trainer.init(jax.random.key(0), batch)
  assert (
    costs['temp_bytes']
    == trainer.step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes
  )
  assert costs['updates'] == 3
  assert costs['compile_s'] > 0


def test_growth() -> None:
  """Exact on powers; refuses what has no logarithm and what has no slope."""
  assert cost.growth([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
  assert cost.growth([10, 20, 40], [5, 5, 5]) == pytest.approx(0)
  with pytest.raises(ValueError, match='positive numbers at two or more different x'):
    cost.growth([1, 2], [1, 0])
  with pytest.raises(ValueError, match='positive numbers at two or more different x'):
    cost.growth([3, 3], [1, 2])


def fake_measure(
  model: Any,
  loss: Any,
  make_optimizer: Any,
  method: str,
  batch: fptt_jax.Batch,
  **options: Any,
) -> dict[str, Any]:
  """Costs as the theory has them: a step's gradient 2 ms, an update 6 ms."""
  steps = batch.inputs.shape[0]
  updates = options['num_windows'] or 1
  passes = steps if method == 'ftrl' else 1
  times = {
    'gradient_ms': 2.0 * steps * passes,
    'update_ms': 6.0 * updates,
    '± update_ms': 30.0,
  }
  return {**times, 'temp_bytes': 2**20, 'updates': updates}


def test_table1_has_each_combination_once(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  """K = T stands once, K above T nowhere, FTRL up to its limit only, C is update over
  gradient step where the update takes longer than its interval, 30 ms; rows come as
  they are made, and become a plot.
  """
  monkeypatch.setattr(cost, 'measure', fake_measure)
  monkeypatch.setattr(cost, 'FTRL_STEPS', 4)
  seen: list[dict[str, Any]] = []
  rows = cost.table1(
    (4, 8), (2, 4, 6), hidden=2, batch_size=3, repeats=1, progress=seen.append
  )
  assert rows == seen
  four = [('bptt', 1), ('ftrl', 4), ('fptt', 4), ('fptt', 2)]
  eight = [('bptt', 1), ('fptt', 8), ('fptt', 2), ('fptt', 4), ('fptt', 6)]
  assert [(row['T'], row['method'], row['K']) for row in rows] == [
    (4, *r) for r in four
  ] + [(8, *r) for r in eight]
  assert {
    (row['method'], row['K']): row['C'] for row in rows if row['C'] is not None
  } == {('fptt', 6): 3.0, ('fptt', 8): 3.0}
  cost.plot(tmp_path / 'table1.png', rows)
  assert (tmp_path / 'table1.png').stat().st_size > 10_000


def test_table1_measures(monkeypatch: pytest.MonkeyPatch) -> None:
  """The real thing, once: methods that fix K and methods that do not, as many updates
  as each makes.
  """
  monkeypatch.setattr(
    add_task, 'make_model', lambda config: helpers.elman(hidden=config.hidden)
  )
  monkeypatch.setattr(cost, 'FTRL_STEPS', 0)
  rows = cost.table1(
    (3,), (), hidden=2, batch_size=2, repeats=1, progress=lambda row: None
  )
  assert {(row['method'], row['updates']) for row in rows} == {('bptt', 1), ('fptt', 3)}
  assert all(row['temp_bytes'] > 0 and row['gradient_ms'] > 0 for row in rows)
