"""The study of windows that follow each other or are interleaved."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments import add_task
from experiments.paper import __main__ as paper
from experiments.paper import interleaving
from experiments.paper.settings import Config
from experiments.records import store
from experiments.records.collect import Origin, collect_folder
import fptt_jax

TINY = interleaving.Settings(
  seq_len=12,
  num_windows=3,
  hidden=4,
  batch_size=8,
  lanes=1,
  rounds=4,
  test_size=16,
  rates=(0.01, 0.1),
)


def train(settings: interleaving.Settings, order: str, rate: float, seed: int) -> float:
  return float(
    interleaving.train(settings, order, 0.3, jnp.float32(rate), jnp.int32(seed))
  )


def test_one_lane_trains_as_the_library_s_trainer() -> None:
  """Step by step on the batches that the study draws, with the same schedule."""
  weights_key, batch_key, test_key = jax.random.split(jax.random.key(5), 3)
  model = add_task.make_model(add_task.Config(hidden=4))
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.cosine_decay_schedule(0.1, 12), b1=0.3),
  )
  loss = fptt_jax.losses.terminal_regression()
  trainer = fptt_jax.make_trainer(model, loss, optimizer, num_windows=3, method='tbptt')
  state = None
  for number in range(4):
    key = jax.random.split(jax.random.fold_in(batch_key, number), 1)[0]
    batch = add_task.draw_batch(key, 12, 8)
    if state is None:
      state = trainer.init(jax.random.key(0), batch)
      params = model.init(weights_key)
      state = state._replace(params=params, opt_state=optimizer.init(params))
    state, _ = trainer.step(state, batch)
  assert state is not None
  sums, _ = trainer.evaluate(state.params, add_task.draw_batch(test_key, 12, 16))
  expected = fptt_jax.compute_metrics(sums)['loss']
  for order in interleaving.ORDERS:
    assert train(TINY, order, 0.1, 5) == pytest.approx(expected, rel=1e-4)


def test_lanes_are_interleaved_as_a_plain_loop_does_it() -> None:
  """Three lanes of three windows: the first window of each, then the second of each,
  with the hidden state of each lane carried on.
  """
  settings = TINY._replace(lanes=3, rounds=2)
  weights_key, batch_key, test_key = jax.random.split(jax.random.key(5), 3)
  model = add_task.make_model(add_task.Config(hidden=4))
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.cosine_decay_schedule(0.1, 18), b1=0.3),
  )
  params = model.init(weights_key)
  opt_state = optimizer.init(params)

  @jax.value_and_grad
  def loss(params: Any, hidden: Any, x: jax.Array, targets: jax.Array, k: int) -> Any:
    _, outputs = model.apply(params, hidden, x, None, None)
    return (k + 1) / 3 * jnp.mean((outputs[-1, :, 0] - targets) ** 2)

  for number in range(2):
    keys = jax.random.split(jax.random.fold_in(batch_key, number), 3)
    batches = [add_task.draw_batch(key, 12, 8) for key in keys]
    states = [model.initial_state(8) for _ in batches]
    for k in range(3):
      for lane, batch in enumerate(batches):
        x = batch.inputs[4 * k : 4 * k + 4]
        _, grads = loss(params, states[lane], x, batch.targets, k)
        states[lane], _ = model.apply(params, states[lane], x, None, None)
        steps, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, steps)
  test = add_task.draw_batch(test_key, 12, 16)
  _, outputs = model.apply(params, model.initial_state(16), test.inputs, None, None)
  expected = float(jnp.mean((outputs[-1, :, 0] - test.targets) ** 2))
  assert train(settings, 'interleaved', 0.1, 5) == pytest.approx(expected, rel=1e-4)
  assert train(settings, 'sequential', 0.1, 5) != pytest.approx(expected, rel=1e-4)


def test_the_best_rate_is_chosen_on_another_seed(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """The lowest rate is the best one on the seed of tuning, and the worst on others."""

  def error(
    settings: Any, order: str, momentum: float, rate: jax.Array, seed: jax.Array
  ) -> jax.Array:
    return jnp.where(seed == settings.tune_seed, rate, 1 - rate)

  monkeypatch.setattr(interleaving, 'train', error)
  rows = interleaving.study(TINY, 'interleaved', 0.3, (0, 1))
  best = min(TINY.rates)
  assert [row['rate'] for row in rows] == [best, best]
  assert not rows[0]['is_inside']
  assert [row['test_mse'] for row in rows] == pytest.approx([1 - best, 1 - best])


def test_a_stopped_command_resumes_and_its_report_is_collected(tmp_path: Path) -> None:
  config = Config(item='interleaving', scale='smoke', workdir=str(tmp_path / 'run'))
  paper.main(config)
  [kept, *others] = sorted((tmp_path / 'run').glob('*-smoke.json'))
  before = kept.stat().st_mtime_ns
  for path in others:
    path.unlink()
  paper.main(config)
  assert kept.stat().st_mtime_ns == before
  collect_folder(tmp_path / 'run', 'interleaving', Origin(), tmp_path)
  rows = store.load('interleaving', tmp_path).rows
  assert len(rows) == 4
  assert {row.settings['order'] for row in rows} == set(interleaving.ORDERS)
