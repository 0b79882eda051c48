"""The search for each method's learning rate and momentum, and the stored table."""

import dataclasses
import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import jax.numpy as jnp
import pytest

from experiments import add_task
from experiments.core import files, optimizers, rates
from experiments.core.rates import Rates
from experiments.core.schedule import list_members

GRID = [Rates(lr, momentum) for lr in rates.RATES for momentum in rates.MOMENTA]
SCORES = st.lists(st.none() | st.floats(0, 1), min_size=len(GRID), max_size=len(GRID))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SCORES)
def test_the_search_ends_where_no_neighbor_is_better(
  scores: list[float | None],
) -> None:
  """Every neighbor of what is chosen has been tried, whatever the scores; divergence is
  never better.
  """
  known = dict(zip(GRID, scores, strict=True))
  asked: list[Rates] = []

  def score(point: Rates) -> float | None:
    asked.append(point)
    return known[point]

  best, tried = rates.search(score)
  assert len(asked) == len(set(asked))  # Each point is trained once.
  assert tried == {point: known[point] for point in asked}
  for point in rates.neighbors(best):
    assert point in tried
    assert not rates.is_better(tried[point], tried[best])
  inner = best.lr not in (rates.RATES[0], rates.RATES[-1])
  assert rates.is_inside(best, tried) == inner


@pytest.mark.parametrize(
  ('learns', 'others', 'chosen'),
  [(1.0, 0.166, 1.0), (1e-5, None, 1e-5), (None, 0.166, None), (None, None, None)],
)
def test_the_search_goes_on_where_nothing_has_learned(
  learns: float | None, others: float | None, chosen: float | None
) -> None:
  """Upward from chance, downward from divergence; if that does not help, the table says
  so.
  """
  scores = {Rates(lr, 0.9): 0.01 for lr in (learns,) if lr}
  best, tried = rates.search(lambda point: scores.get(point, others), 1 / 6)
  row = rates.entry(best, tried, 1 / 6)
  assert row['learned'] == (chosen is not None)
  assert chosen is None or best.lr == chosen
  end = rates.RATES[0 if others is None else -1]
  assert end in {point.lr for point in tried}


def test_one_rate_that_is_worse_does_not_end_the_search() -> None:
  """The rate above it is tried as well."""
  scores = {Rates(1e-2, 0.9): 0.5, Rates(3e-2, 0.9): 0.1, rates.START: 0.4}
  best, _ = rates.search(lambda point: scores.get(point, 1.0))
  assert best == Rates(3e-2, 0.9)


def test_the_search_extends_to_the_best_of_a_bowl() -> None:
  """One minimum far from the start is found, and lower and higher rates beside it."""
  place = {lr: number for number, lr in enumerate(rates.RATES)}
  best, tried = rates.search(lambda point: abs(place[point.lr] - 8) + point.momentum)
  assert best == Rates(0.1, 0.0)
  assert {Rates(0.03, 0.0), Rates(0.3, 0.0), Rates(0.1, 0.9)} <= tried.keys()


def test_the_stored_table_is_of_the_defaults() -> None:
  """The chosen points have the lowest score of those tried, at the default settings, on
  a seed that is not reported on.
  """
  content = json.loads(rates.FILE.read_text())
  config = add_task.Config()
  assert list(content['methods']) == list(config.method)
  assert content['settings'] == {name: getattr(config, name) for name in rates.SETTINGS}
  assert content['seed'] == rates.SEED
  assert rates.SEED not in config.seeds
  for row in content['methods'].values():
    finite = [one for one in row['tried'] if one['score'] is not None]
    best = min(finite, key=lambda one: one['score'])
    assert (row['lr'], row['momentum']) == (best['lr'], best['momentum'])
    beside = [one['lr'] for one in row['tried'] if one['momentum'] == row['momentum']]
    assert row['inside'] == (min(beside) < row['lr'] < max(beside))


def test_each_method_has_its_own_rates_unless_they_are_given() -> None:
  """What is given holds for all methods; what is not is the method's own, down to the
  optimizer's state.
  """
  own = add_task.TUNED.methods
  assert own['bptt'] != own['tbptt']
  for config, expected in [
    (add_task.Config(), own),
    (
      add_task.Config(lr=0.5),
      {name: Rates(0.5, point.momentum) for name, point in own.items()},
    ),
    (
      add_task.Config(momentum=-0.3),
      {name: Rates(point.lr, -0.3) for name, point in own.items()},
    ),
    (
      add_task.Config(grid=('lr=0.25',), momentum=0.0),
      {name: Rates(0.25, 0.0) for name in own},
    ),
  ]:
    for member in list_members(config):
      assert (member.config.lr, member.config.momentum) == expected[member.method]
      state = optimizers.make_optimizer(config.variants()[0][1], member.method).init(
        {'w': jnp.ones(2)}
      )
      found = state.hyperparams
      assert float(found['learning_rate']) == pytest.approx(expected[member.method].lr)
      assert float(found['momentum']) == pytest.approx(expected[member.method].momentum)


def test_what_the_table_does_not_have_is_said_to_be_untuned(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Other methods, other optimizers, other settings."""
  assert 'untuned' in add_task.rates_in_words(add_task.Config(optimizer='sgd'))
  assert 'ogd: untuned' in add_task.rates_in_words(
    add_task.Config(method=('fptt', 'ogd'))
  )
  assert 'seq_len 120, here 60' in add_task.rates_in_words(add_task.Config(seq_len=60))
  for changed in (
    dict(method=('tbptt',), influence='snap1'),
    dict(coupling='update'),
    dict(averaging='running'),
    dict(linear_scale=0.0),
    dict(momentum_windows=11),
    dict(products='bfloat16'),
    dict(method=('fptt',), evaluate_at='w_bar'),
    dict(eval_every=500),
  ):
    [*_, name] = changed
    words = add_task.rates_in_words(add_task.Config(**changed))
    assert f'at other settings ({name} ' in words
  assert 'given' in add_task.rates_in_words(add_task.Config(lr=0.1, momentum=0.0))
  edge = add_task.TUNED._replace(unsettled=('tbptt',))
  monkeypatch.setattr(add_task, 'TUNED', edge)
  assert 'the best rate of tbptt is at the edge' in add_task.rates_in_words(
    add_task.Config()
  )
  unlearned = edge._replace(unlearned=('bptt',))
  monkeypatch.setattr(add_task, 'TUNED', unlearned)
  assert 'no rate of bptt was better than chance' in add_task.rates_in_words(
    add_task.Config()
  )
  monkeypatch.setattr(add_task, 'TUNED', edge._replace(unsettled=()))
  plain = add_task.rates_in_words(add_task.Config())
  assert 'edge' not in plain
  assert f'seed {rates.SEED}' in plain
  assert 'other settings' not in plain
  [sgd] = list_members(add_task.Config(method=('ogd',), optimizer='sgd'))
  assert (sgd.config.lr, sgd.config.momentum) == (add_task.UNTUNED_RATE, 0.0)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('lr', 0.1),
    ('momentum', 0.0),
    ('grid', ('alpha=0.1',)),
    ('seeds', (3,)),
    ('optimizer', 'sgd'),
  ],
)
def test_what_tuning_chooses_is_not_given_with_it(name: str, value: object) -> None:
  method = ('fptt',)
  with pytest.raises(ValueError, match=f'--{name} .*tune.*, got'):
    add_task.Config(tune=True, method=method, **{name: value})


def test_the_seed_of_tuning_is_not_reported_on() -> None:
  with pytest.raises(ValueError, match=r'--seeds .*got \(0, 1000\)'):
    add_task.Config(seeds=(0, rates.SEED))
  add_task.Config(seeds=(rates.SEED,), lr=0.1, momentum=0.0)


def test_tuning_trains_each_point_once(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  """--tune writes the table, the script's own reader reads it, and the same command
  again trains nothing.
  """
  monkeypatch.setattr(rates, 'RATES', (1e-3, 3e-3, 1e-2))
  monkeypatch.setattr(rates, 'MOMENTA', (0.9,))
  tiny = dict(seq_len=4, hidden=2, batch_size=4, batches=2, eval_every=1, test_size=8)
  config = add_task.Config(method=('bptt',), tune=True, workdir=str(tmp_path), **tiny)
  add_task.main(config)
  first = (tmp_path / 'rates.json').read_text()
  table = rates.read_table(tmp_path / 'rates.json')
  row = json.loads(first)['methods']['bptt']
  assert table.methods['bptt'] == Rates(row['lr'], row['momentum'])
  assert table.settings['seq_len'] == 4
  for one in row['tried']:
    folder = (
      tmp_path / 'tune' / 'bptt' / f'bptt-seed{rates.SEED}-lr{one["lr"]:g}-momentum0.9'
    )
    late = files.read_jsonl(folder / 'metrics.jsonl')[-1]
    assert one['score'] == late['test_mse']
  assert (tmp_path / 'rates.png').exists()
  assert f'bptt: lr {row["lr"]:g}, momentum 0.9' in capsys.readouterr().out
  add_task.main(dataclasses.replace(config, method=('tbptt',)))
  assert set(rates.read_table(tmp_path / 'rates.json').methods) == {'bptt', 'tbptt'}
  (tmp_path / 'rates.json').write_text(first)
  monkeypatch.setattr(add_task, 'train', None)
  add_task.main(dataclasses.replace(config))
  assert (tmp_path / 'rates.json').read_text() == first
