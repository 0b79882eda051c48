"""Paired comparisons of methods, and the tables of the tournament made of them."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from experiments.core.comparison import compare, holm
from experiments.core.flags import UserError
from experiments.paper import items, tournament
from experiments.records import contest, store, tables
from experiments.records.store import Row


def test_p_values_are_scipy_s():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=5), rng.normal(0.4, 1.0, size=5)
  found = compare(a.tolist(), b.tolist())
  assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue)
  assert found.wins == int((a < b).sum())
  assert found.is_better == (a.mean() < b.mean())
  # The interval of the mean difference excludes 0 exactly where p < 0.05.
  low, high = stats.t.interval(0.95, 4, np.mean(a - b), stats.sem(a - b))
  assert (found.p_value < 0.05) == (not low < 0 < high)
  assert found.difference == pytest.approx(np.mean(a - b))
  assert found.half_width == pytest.approx((high - low) / 2)


def test_diverged_runs_lose_and_have_no_p_value():
  found = compare([1.0, None, 1.0], [2.0, 2.0, math.nan])
  assert (found.wins, found.seeds, found.p_value) == (2, 3, None)
  assert found.difference is found.half_width is None
  assert not compare([None, 1.0], [2.0, 2.0]).is_better
  both = compare([None, 1.0], [None, 2.0])
  assert (both.wins, both.difference) == (1, None)
  # A pair that both diverged has no size, so that there is no test either.
  both = compare([None, 1.0, 1.5], [None, 2.0, 3.0])
  assert both.p_value is both.half_width is None
  assert compare([None], [None]).wins == 0
  assert compare([1.0, 1.0], [1.0, 1.0]).p_value is None


def test_holm_rejects_as_its_definition_does():
  """Step down: the smallest p against level/m, the next against level/(m - 1), and so
  on until one is not below; over all orders. A comparison without a p-value is one of
  the m, too, and is never rejected.
  """
  p_values = [0.012, 0.001, 0.03, 0.2]
  for order in itertools.permutations(p_values):
    adjusted = holm([*order, None])
    assert adjusted[-1] is None
    for level in (0.003, 0.02, 0.035, 0.05, 0.07, 0.3):
      rejected = set()
      for rank, p in enumerate(sorted(order)):
        if p > level / (len(order) + 1 - rank):
          break
        rejected.add(p)
      pairs = zip(order, adjusted[:-1], strict=True)
      found = {p for p, adjusted_p in pairs if adjusted_p <= level}
      assert found == rejected
  assert holm([0.6, 0.7]) == [1.0, 1.0]
  assert holm([]) == []


def row(line, seed, value, curve=(0.5, 0.2)):
  return Row(
    series='cpu',
    stage='final',
    line=line,
    run=f'run-seed{seed}',
    seed=seed,
    tuned=True,
    status='done',
    settings={'method': 'tbptt', 'lr': 0.01},
    source={},
    numbers={'test_mse': value, 'K': 10, 'seconds': 1.0},
    curves={'step': [1, 2], 'seconds': [0.5, 1.0], 'test_mse': list(curve)},
  )


def cost(method, batch_ms):
  """Return a row of the study `costs`."""
  settings = {'task': 'adding-K10', 'method': method}
  numbers = {'batch_ms': batch_ms, 'relative': 1.0}
  return Row(
    series='cpu',
    stage='costs',
    line=method,
    run='',
    seed=None,
    tuned=None,
    status='done',
    settings=settings,
    source={'versions': {'jax': '1'}},
    numbers=numbers,
  )


def test_a_table_names_the_method_that_beats_both(tmp_path):
  """`momentum0` has half the loss of both rivals at every seed; `by_window` beats
  one of them. At equal seconds, the score of a method whose batches cost twice as much
  is an earlier one, and that of a method without a cost is not known.
  """
  rng = np.random.default_rng(1)
  rows = []
  means = {'bptt': 0.02, 'tbptt': 0.01, 'momentum0': 0.005, 'by_window': 0.0101}
  for name, mean in means.items():
    for seed in range(5):
      value = mean * math.exp(0.05 * rng.normal())
      rows.append(row(f'adding-K10.{name}', seed, value))
  measured = [cost('tbptt', 1.0), cost('momentum0', 2.0), cost('by_window', 1.05)]
  series = {'cpu': {'scale': 'cpu', 'notes': ''}}
  store.save(store.Item('walltime', series, measured), tmp_path)
  [text] = tables.final_tables('tournament', 'cpu', rows, {}, tmp_path)
  lines = {
    cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
    for cells in (line.split('|') for line in text.splitlines() if '|' in line)
  }
  header = lines.pop('method')
  assert 'Task `adding-K10`, test MSE:' in text
  best = dict(zip(header, lines['momentum0'], strict=True))
  assert best[''] == 'beats both'
  assert best['better than tbptt'] == best['better than bptt'] == '5 of 5'
  assert float(best['p, tbptt']) < 0.05
  assert best['at equal seconds'] == '0.5000'
  other = dict(zip(header, lines['by_window'], strict=True))
  assert other[''] == ''
  assert other['at equal seconds'] == '0.2000'
  without = dict(zip(header, lines['bptt'], strict=True))
  assert without['at equal seconds'] == ''
  methods = contest.by_task(rows)['adding-K10']
  found = contest.comparisons(methods, items.ERROR, 'tbptt')
  logs = {
    name: [math.log(r.numbers['test_mse']) for r in of_method]
    for name, of_method in methods.items()
  }
  raw = [stats.ttest_rel(logs[n], logs['tbptt']).pvalue for n in found]
  assert [p for _, p in found.values()] == pytest.approx(holm(raw))


def test_the_overview_marks_what_is_sure(tmp_path):
  """Ratios of geometric means: half the loss at every seed is bold, twice is italic,
  and one seed that diverged leaves a dash.
  """
  rng = np.random.default_rng(1)
  factors = {'momentum0': 0.5, 'fptt-kappa1': 2.0}
  tasks = ('recall', 'adding-K3', 'adding-K10', 'adding-K50', 'permuted-rows')
  rows = []
  for arena in tournament.ARENAS:
    if arena.name not in (*tasks, 'pooled-pixels'):
      continue
    task = arena.name
    for seed in range(5):
      own = math.exp(rng.normal())
      for name in [contestant.name for contestant in tournament.contestants(arena)]:
        # A task that lacks a method is left out.
        if task == 'pooled-pixels' and name == 'by_window':
          continue
        factor = factors.get(name, 1.0)
        lost = name == 'average' and seed == 0
        noise = math.exp(0.02 * rng.normal())
        value = None if lost else 0.001 * own * factor * noise
        rows.append(row(f'{task}.{name}', seed, value))
  found = tables.standings(rows)['adding-K3']
  assert found['momentum0'].outcome == 'better'
  assert found['momentum0'].ratio == pytest.approx(0.5, rel=0.05)
  assert found['momentum0'].low < found['momentum0'].ratio < found['momentum0'].high
  assert found['fptt-kappa1'].outcome == 'worse'
  assert found['average'] == contest.Standing(None, None, None, '')
  for one in rows:
    one.source.update(versions={'jax': '1'})
  series = {'cpu': {'scale': 'cpu', 'notes': ''}}
  store.save(store.Item('tournament', series, rows), tmp_path)
  text = tables.overview('cpu', tmp_path)
  header, _, *lines = text.splitlines()
  columns = ' | '.join(f'`{task}`' for task in tasks)
  assert header == f'| method | {columns} |'
  by_name = {line.split('|')[1].strip(' `'): line for line in lines}
  assert by_name['momentum0'].startswith('| `momentum0` | **0.')
  assert '| *2.0' in by_name['fptt-kappa1'] or '| *1.9' in by_name['fptt-kappa1']
  assert by_name['average'] == '| `average` | – | – | – | – | – |'
  with pytest.raises(UserError, match="must be of one of cpu, got 'short'"):
    tables.overview('short', tmp_path)


def test_solved_problems_are_equal():
  rows = [row('recall.tbptt', seed, 10.0**-power) for seed, power in enumerate((9, 14))]
  assert contest.losses(rows, items.ERROR) == {0: math.log(1e-6), 1: math.log(1e-6)}


def test_accuracies_are_compared_by_errors():
  """99 against 98 % is half the errors; a run that diverged has no number."""
  rows = [row('permuted-rows.tbptt', seed, None) for seed in (0, 1)]
  rows = [
    dataclasses.replace(one, numbers={'test_accuracy': value})
    for one, value in zip(rows, (99.0, None), strict=True)
  ]
  assert contest.losses(rows, items.ACCURACY) == {0: 0.0, 1: None}


@pytest.mark.parametrize('scale', items.SCALES)
def test_lines_of_a_task_differ_in_the_method_alone(scale):
  """All lines have the same rates, and the data, sizes and batches of their task."""
  entries = items.tournament_of(scale)
  shared = ('task', 'seq_len', 'hidden', 'batch_size', 'batches', 'epochs', 'clip')
  for arena in tournament.ARENAS:
    lines = [entry for entry in entries if entry.task == arena.name]
    if arena.script == 'stream':
      assert bool(lines) == (scale == 'cpu')
      continue
    assert {entry.label for entry in lines} >= {
      f'{arena.name}.{name}' for name in ('bptt', 'tbptt', 'momentum0', 'by_window')
    }
    assert {entry.rates for entry in lines} == {tournament.RATES[arena.optimizer]}
    for name in shared:
      assert len({getattr(entry.config, name, None) for entry in lines}) == 1
    cut = [entry for entry in lines if entry.config.method != ('bptt',)]
    windows = {entry.config.num_windows for entry in cut}
    assert len(windows - {tournament.ADDING['seq_len']}) == 1
    for entry in lines:
      assert entry.config.momentum_windows in (0, entry.config.num_windows)
      constant = entry.config.averaging != 'none'
      assert entry.config.decay != constant


def test_lines_of_a_stream_differ_in_the_method_alone():
  """All methods without and with credit, at one rate for all steps and one S."""
  entries = items.tournament_of('cpu')
  for size in (1, 8):
    name = f'sf-temps-S{size}'
    lines = [entry for entry in entries if entry.task == name]
    labels = {entry.label.removeprefix(f'{name}.') for entry in lines}
    without = {label for label in labels if not label.endswith('-snap1')}
    assert labels == without | {f'{label}-snap1' for label in without}
    assert {'tbptt', 'momentum0', 'fptt-kappa2', 'average'} <= without
    assert not labels & {'bptt', 'by_window'}
    assert {entry.config.window_size for entry in lines} == {size}
    # 50 days of hours.
    horizons = {
      entry.config.average_horizon
      for entry in lines
      if entry.config.averaging == 'running'
    }
    assert horizons == {50 * 24 // size}


def test_bootstrapped_windows_differ_from_tbptt_in_their_targets_alone():
  """On the recall from `early`, which gives the target to all windows."""
  entries = {entry.label: entry.config for entry in items.tournament_of('cpu')}
  found = [label for label in entries if label.endswith('.bootstrap')]
  assert len(found) == 6
  for label in found:
    rival = 'early' if label.startswith('recall') else 'tbptt'
    config = entries[label]
    plain = dataclasses.replace(config, bootstrap=0.0, average_horizon=500)
    assert plain == entries[label.replace('bootstrap', rival)]
    assert config.bootstrap == 0.9
    assert config.average_horizon == 50 * config.num_windows
