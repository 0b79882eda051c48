"""Results: collected from run folders, kept, and made into tables and plots again."""

import dataclasses
import gzip
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
import matplotlib.image as mpimg
import numpy as np
import pytest

from experiments.core import environment, flags
from experiments.core.comparison import interval
from experiments.core.flags import UserError
from experiments.paper import __main__ as paper
from experiments.paper.settings import Config
from experiments.records import contest, plots, store, tables
from experiments.records.collect import Origin, collect_folder
from experiments.results import __main__ as command

ROOT = Path(__file__).parents[1]
CPU = Origin(scale='cpu')
MACHINE = {
  'command': 'python -m experiments.add_task',
  'commit': 'abc',
  'hardware': {'cpu_cores': 2},
}


def write_run(
  folder: Path,
  name: str,
  curve: list[float | None],
  done: bool = True,
  config: dict[str, Any] | None = None,
  **result: Any,
) -> None:
  """Writes a run as the scripts leave it: with metrics, and a result once it is
  done.
  """
  run = folder / name
  run.mkdir(parents=True, exist_ok=True)
  seed = int(name.partition('-seed')[2].partition('-')[0])
  method = name.partition('-seed')[0]
  described = {
    'script': 'add_task',
    'method': [method],
    'seeds': [seed],
    'lr': 0.001,
    'sha256': 'x',
  }
  (folder / 'config.json').write_text(json.dumps(described | (config or {})))
  (folder / 'summary.json').write_text(
    json.dumps({'config': {}, 'runs': [], **MACHINE})
  )
  lines = [
    {'step': step, 'test_mse': value} for step, value in enumerate(curve, start=1)
  ]
  (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  if done:
    known = {'method': method, 'seed': seed, 'K': 3, 'seconds': 1.5}
    known |= {'test_mse': curve[-1]} if curve else {}
    (run / 'result.json').write_text(
      json.dumps(known | result | {'config_sha256': 'x'})
    )


def collected(
  folder: Path, out: Path, item: str = 'fig1', origin: Origin = CPU
) -> store.Item:
  collect_folder(folder, item, origin, out)
  return store.load(item, out)


def files(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


NUMBERS = st.one_of(
  st.none(),
  # Squares of greater numbers, which intervals take, overflow.
  st.floats(-1e100, 1e100),
  st.integers(-(10**9), 10**9),
)
RUNS = st.dictionaries(
  st.tuples(
    st.sampled_from(('', 'bptt', 'fptt-K3', 'tune/fptt-K3')), st.integers(0, 3)
  ),
  st.tuples(st.lists(NUMBERS, min_size=1, max_size=4), st.booleans()),
  min_size=1,
  max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(found=RUNS)
def test_nothing_measured_is_lost(
  tmp_path_factory: pytest.TempPathFactory, found: dict[Any, Any]
) -> None:
  """Each run becomes one row with its numbers and rounded curve, whatever they are;
  collecting again changes no byte.
  """
  folder, out = tmp_path_factory.mktemp('runs'), tmp_path_factory.mktemp('out')
  for (line, seed), (curve, done) in found.items():
    write_run(folder / line, f'fptt-seed{seed}', curve, done)
  rows = collected(folder, out).rows
  got = {(row.stage, row.line, row.seed): row for row in rows}
  assert len(got) == len(rows) == len(found)
  for (line, seed), (curve, done) in found.items():
    stage = 'tuning' if line.startswith('tune/') else 'final'
    row = got[stage, line.removeprefix('tune/') or 'fptt', seed]
    for kept, value in zip(row.curves['test_mse'], curve, strict=True):
      rounded = None if value is None else pytest.approx(value, rel=5.1e-6, abs=0.0)
      assert kept == rounded
    assert row.status == ('done' if done else 'unfinished')
    assert row.numbers.get('test_mse', 'none') == (curve[-1] if done else 'none')
    assert (row.settings['lr'], row.settings['method'], row.source) == (
      0.001,
      'fptt',
      MACHINE,
    )
  before = files(out)
  collect_folder(folder, 'fig1', CPU, out)
  assert files(out) == before
  store.save(store.load('fig1', out), out)
  assert files(out) == before
  tables.table_of('fig1', out)


def test_settings_are_kept_as_differences(tmp_path: Path) -> None:
  """Settings come back with their types and in their order; those that are alike share
  a base of their most common values.
  """
  common = {'lr': 0.1, 'seeds': [0, 1], 'decay': True}
  several = [
    common,
    common | {'lr': 1},
    common | {'lr': 1.0},
    common | {'decay': 1, 'seeds': []},
    common | {'decay': None},
    {'seeds': [], 'decay': 1, 'lr': 2},
    {},
  ]
  rows = [
    store.Row('cpu', 'final', 'line', f'run{i}', i, True, 'done', one, MACHINE, {})
    for i, one in enumerate(several)
  ]
  store.save(store.Item('fig1', {'cpu': {}}, rows), tmp_path)
  got = [row.settings for row in store.load('fig1', tmp_path).rows]
  assert [repr(one) for one in got] == [repr(one) for one in several]
  content = json.loads((tmp_path / 'fig1.json').read_text())
  assert list(content['bases'].values()).count(common) == 1
  assert len(content['bases']) == 3


def test_the_order_of_collecting_does_not_matter(tmp_path: Path) -> None:
  """Two folders, collected either way, make the same bytes; no time of day is in
  them.
  """
  for seed in (0, 1):
    write_run(tmp_path / f'run{seed}' / 'fptt', f'fptt-seed{seed}', [0.5, 0.25])
  for out, order in (('a', (0, 1)), ('b', (1, 0))):
    (tmp_path / out).mkdir()
    for seed in order:
      collect_folder(tmp_path / f'run{seed}', 'fig1', CPU, tmp_path / out)
  assert files(tmp_path / 'a') == files(tmp_path / 'b')
  packed = (tmp_path / 'a' / 'fig1.curves.jsonl.gz').read_bytes()
  assert packed[4:8] == bytes(4)  # The time in a gzip header.


def test_a_run_that_goes_on_takes_the_place_of_what_it_was(tmp_path: Path) -> None:
  """Unfinished, then done with a later commit, then the same again: one row, and its
  source is that of its numbers.
  """
  out = tmp_path / 'out'
  out.mkdir()
  write_run(tmp_path / 'run', 'fptt-seed0', [0.5], done=False)
  [row] = collected(tmp_path / 'run', out).rows
  assert (row.status, row.numbers) == ('unfinished', {})
  assert 'unfinished; seed 0 after 1' in tables.table_of('fig1', out)
  write_run(tmp_path / 'run', 'fptt-seed0', [0.5, 0.25])
  summary = tmp_path / 'run' / 'summary.json'
  summary.write_text(json.dumps({'runs': [], **MACHINE, 'commit': 'later'}))
  [row] = collected(tmp_path / 'run', out).rows
  assert (row.status, row.numbers['test_mse'], row.source['commit']) == (
    'done',
    0.25,
    'later',
  )
  summary.write_text(json.dumps({'runs': [], **MACHINE, 'commit': 'latest'}))
  [row] = collected(tmp_path / 'run', out).rows
  assert (
    row.source['commit'] == 'later'
  )  # Another command in the folder has not measured this run.
  [row] = collected(
    tmp_path / 'run', out, origin=Origin(scale='cpu', commit='told', notes='A note.')
  ).rows
  assert row.source['commit'] == 'told'
  assert 'A note.' in tables.table_of('fig1/cpu', out)


def test_curves_keep_six_digits(tmp_path: Path) -> None:
  """Numbers along a run are rounded; whole numbers and missing ones stay, and the
  result keeps all digits.
  """
  write_run(tmp_path / 'run', 'fptt-seed0', [1 / 3, None, 2e-9 / 3])
  [row] = collected(tmp_path / 'run', tmp_path).rows
  assert row.curves['test_mse'] == [0.333333, None, 6.66667e-10]
  assert all(isinstance(step, int) for step in row.curves['step'])
  assert row.numbers['test_mse'] == 2e-9 / 3
  # The same run once more is the same row, not another run of its name.
  assert collected(tmp_path / 'run', tmp_path).rows == [row]


def test_series_stand_beside_each_other(tmp_path: Path) -> None:
  """The same run under two names is two rows; each series keeps its notes and its
  scale.
  """
  write_run(tmp_path / 'run', 'fptt-seed0', [0.5])
  out = tmp_path / 'out'
  out.mkdir()
  collect_folder(tmp_path / 'run', 'fig1', Origin('first', 'cpu', notes='Busy.'), out)
  item = collected(tmp_path / 'run', out, origin=Origin('second', 'short'))
  assert [row.series for row in item.rows] == ['first', 'second']
  assert item.series == {
    'first': {'scale': 'cpu', 'notes': 'Busy.'},
    'second': {'scale': 'short', 'notes': ''},
  }
  with pytest.raises(UserError, match=r'--scale.*cpu.*full'):
    collect_folder(tmp_path / 'run', 'fig1', Origin('first', 'full'), out)


def test_results_are_not_replaced_by_others(tmp_path: Path) -> None:
  """A done run may go on, as with more epochs; a second run of the same name wants a
  series of its own.
  """
  out = tmp_path / 'out'
  out.mkdir()
  write_run(tmp_path / 'run', 'fptt-seed0', [0.5, 0.25])
  collect_folder(tmp_path / 'run', 'fig1', CPU, out)
  write_run(tmp_path / 'run', 'fptt-seed0', [0.5, 0.25, 0.125], config={'epochs': 3})
  [row] = collected(tmp_path / 'run', out).rows
  assert (row.numbers['test_mse'], row.settings['epochs']) == (0.125, 3)
  before = files(out)
  write_run(tmp_path / 'run', 'fptt-seed0', [0.5, 0.3, 0.2])
  with pytest.raises(UserError, match=r'--series.*cpu.*fptt-seed0'):
    collect_folder(tmp_path / 'run', 'fig1', CPU, out)
  assert files(out) == before
  assert len(collected(tmp_path / 'run', out, origin=Origin('again', 'cpu')).rows) == 2


def test_runs_that_no_score_measures_are_shown(tmp_path: Path) -> None:
  """All their numbers, and those that have none."""
  write_run(tmp_path / 'run', 'fptt-seed0', [], regret=0.5)
  write_run(tmp_path / 'run', 'fptt-seed1', [], done=False)
  collected(tmp_path / 'run', tmp_path)
  text = tables.table_of('fig1', tmp_path)
  assert '| run | line | status | K | seconds | regret |' in text
  assert '| fptt-seed0 | fptt | done | 3 | 1.5 | 0.5 |' in text
  assert '| fptt-seed1 | fptt | unfinished |  |  |  |' in text


def test_settings_of_a_grid_tell_its_runs_apart(tmp_path: Path) -> None:
  """Runs of one command differ in the grid's settings; so do unfinished ones, which
  have only a name to tell.
  """
  grid = {'grid': ['lr=0.5:3e-05', 'b1=0.9:-0.3'], 'b1': 0.9}
  write_run(
    tmp_path / 'run', 'tbptt-seed0-lr0.5-b1-0.3', [1.0], config=grid, lr=0.5, b1=-0.3
  )
  write_run(
    tmp_path / 'run', 'tbptt-seed0-lr3e-05-b10.9', [2.0], config=grid, done=False
  )
  rows = collected(tmp_path / 'run', tmp_path, item='table4').rows
  assert {(row.settings['lr'], row.settings['b1']) for row in rows} == {
    (0.5, -0.3),
    (3e-5, 0.9),
  }
  assert 'lr' not in rows[0].numbers


def test_runs_of_earlier_commands_keep_their_own_rates(tmp_path: Path) -> None:
  """The configuration holds the grid of the last command alone: none here, and then one
  that a run before it did not have.
  """
  write_run(tmp_path / 'a', 'tbptt-seed0-lr0.01', [1.0], lr=0.01)
  write_run(tmp_path / 'b', 'tbptt-seed0', [1.0], config={'grid': ['lr=0.01']})
  [row] = collected(tmp_path / 'a', tmp_path).rows
  assert (row.settings['lr'], 'lr' in row.numbers) == (0.01, False)
  [row] = collected(tmp_path / 'b', tmp_path, item='fig2').rows
  assert row.settings['lr'] == 0.001


def test_a_result_of_other_settings_does_not_end_a_run(tmp_path: Path) -> None:
  """A run that goes on with --allow_config_change has an older result until it ends."""
  write_run(tmp_path / 'run', 'fptt-seed0', [1.0], config={'sha256': 'y'})
  [row] = collected(tmp_path / 'run', tmp_path).rows
  assert (row.status, row.numbers) == ('unfinished', {})


@pytest.mark.parametrize(
  ('chosen', 'expected'),
  [(0.003, 'yes'), (0.001, 'yes, the lowest tried'), (0.1, 'yes, the highest tried')],
)
@pytest.mark.parametrize('folder', ['a', 'a-K3'])
def test_tuned_lines_say_so(
  tmp_path: Path, folder: str, chosen: float, expected: str
) -> None:
  """`tuned` is true of final runs with what their line's search chose. The table says
  whether the rate is the highest or lowest tried, a diverged one included and an
  unfinished one not; the best of what was tried is bold, which a run that diverged
  never is.
  """
  rates = {0.003: 20.5, 0.001: 30.0, 0.1: 1.0, 0.5: 40.0}
  for lr, score in rates.items():
    lost = {'lost': 'loss is nan'} if lr == 0.1 else {}
    write_run(
      tmp_path / 'run/tune' / folder,
      f'fptt-seed1000-lr{lr}',
      [1.0] if lr == 0.5 else [],
      done=lr != 0.5,
      config={'grid': ['lr=']},
      lr=lr,
      valid_ppl=score,
      **lost,
    )
  for line, lr in (('a', chosen), ('b', chosen), ('c', 0.07), ('d', chosen)):
    write_run(
      tmp_path / 'run' / line,
      'fptt-seed0',
      [],
      config={'lr': lr, 'num_windows': 3},
      valid_ppl=21.0,
      test_ppl=19.0,
    )
  # Line c was trained before the search, and line d with another number of windows.
  tuned = {'a': {'lr': chosen}, 'c': {'lr': chosen}, 'd': {'lr': chosen}}
  tuned['d']['num_windows'] = 7
  (tmp_path / 'run' / 'tuned.json').write_text(json.dumps(tuned))
  rows = collected(tmp_path / 'run', tmp_path, item='table4').rows
  assert [(row.line, row.tuned) for row in rows if row.stage == 'final'] == [
    ('a', True),
    ('b', False),
    ('c', False),
    ('d', False),
  ]
  trials = [row.status for row in rows if row.stage == 'tuning']
  assert sorted(trials) == ['diverged', 'done', 'done', 'unfinished']
  text = tables.table_of('table4', tmp_path)
  assert f'| {folder} | 30.00 | **20.50** | diverged |' in text
  assert f'| a | fptt | 3 | {chosen} | {expected} | 0 |' in text
  assert f'| b | fptt | 3 | {chosen} | no | 0 |' in text


@pytest.mark.parametrize(
  ('lowest', 'expected'),
  [(0.16, 'yes, all at chance'), (0.02, 'yes, the lowest tried')],
)
def test_a_line_that_no_rate_teaches_says_so(
  tmp_path: Path, lowest: float, expected: str
) -> None:
  """Where all trials are at chance, the best rate is best by accident; a run that
  diverged has no score to tell.
  """
  scores = {0.3: None, 0.1: 0.165, 0.03: lowest}
  chosen = 0.03
  for lr, score in scores.items():
    lost = {} if score else {'lost': 'loss is nan'}
    write_run(
      tmp_path / 'run/tune/a',
      f'fptt-seed1000-lr{lr}',
      [],
      config={'grid': ['lr=']},
      lr=lr,
      test_mse=score,
      **lost,
    )
  config = {'lr': chosen, 'num_windows': 3}
  write_run(tmp_path / 'run/a', 'fptt-seed0', [], config=config, test_mse=0.16)
  (tmp_path / 'run' / 'tuned.json').write_text(json.dumps({'a': {'lr': chosen}}))
  collected(tmp_path / 'run', tmp_path)
  text = tables.table_of('fig1', tmp_path)
  assert f'| a | fptt | 3 | {chosen} | {expected} | 0 |' in text


def test_rates_may_be_those_of_another_series(tmp_path: Path) -> None:
  """A line that was tuned elsewhere at the same scale has those rates; else none are
  recorded.
  """
  settings = {'method': 'fptt', 'lr': 0.1}
  tried = [
    store.Row(
      'first', 'tuning', 'a', f'run{lr}', 1000, False, 'done', {'lr': lr}, MACHINE, {}
    )
    for lr in (0.1, 0.01)
  ]
  finals = [
    store.Row(
      series, 'final', 'a', 'run', 0, True, 'done', settings, MACHINE, {'test_mse': 1.0}
    )
    for series in ('second', 'third')
  ]
  scales = {'first': 'cpu', 'second': 'cpu', 'third': 'full'}
  series = {name: {'scale': scale, 'notes': ''} for name, scale in scales.items()}
  store.save(store.Item('fig1', series, tried + finals), tmp_path)
  second, third = (
    tables.table_of(f'fig1/{name}', tmp_path) for name in ('second', 'third')
  )
  assert '| yes, the highest tried |' in second
  assert '| yes, rates not recorded |' in third


def test_methods_at_untuned_rates_are_named_and_not_compared(tmp_path: Path) -> None:
  """A series of several methods has a table once one of them was tuned."""
  for method in ('bptt', 'tbptt'):
    write_run(tmp_path / 'run' / method, f'{method}-seed0', [0.5])
  collected(tmp_path / 'run', tmp_path)
  text = tables.table_of('fig1', tmp_path)
  assert 'the series `cpu`.' in text
  assert '| bptt |' not in text

  (tmp_path / 'run' / 'tuned.json').write_text(json.dumps({'bptt': {'lr': 0.001}}))
  collected(tmp_path / 'run', tmp_path)
  text = tables.table_of('fig1', tmp_path)
  assert 'Not shown' not in text
  assert '| bptt | bptt | 3 | 0.001 | yes, rates not recorded |' in text
  assert '| tbptt | tbptt | 3 | 0.001 | no |' in text


def test_rates_of_the_adding_problem_s_own_table_are_tuned(tmp_path: Path) -> None:
  """The default run's: each method has its own. A rate that was given is not, and the
  table has no rate of other methods.
  """
  tuned = {'lr': None, 'tuned_rates': str({'bptt': (0.01, 0.9)})}
  for method, config in (
    ('bptt', tuned),
    ('tbptt', tuned),
    ('fptt', tuned | {'lr': 0.1}),
  ):
    run = tmp_path / method / 'run'
    write_run(run, f'{method}-seed0', [0.5], config=config, lr=0.01)
    [row] = collected(tmp_path / method, tmp_path / method, item='add_task').rows
    assert row.tuned == (method == 'bptt')


def test_several_seeds_are_averaged_with_an_interval(tmp_path: Path) -> None:
  """Mean and interval as `experiments.paper` has them; a diverged seed is counted and
  left out.
  """
  values = [0.5, 0.25, None]
  for seed, value in enumerate(values):
    lost = {} if value else {'lost': 'loss is nan'}
    write_run(
      tmp_path / 'run', f'fptt-seed{seed}', [value], **{'below_0.01_at': None}, **lost
    )
  collected(tmp_path / 'run', tmp_path)
  half = interval([0.5, 0.25])
  assert half is not None
  text = tables.table_of('fig1', tmp_path)
  assert f'| 0, 1, 2 | 0.3750 ± {half:.4f} | never, never, never | 2 | ' in text
  assert '1 of 3 diverged' in text


def test_the_paper_s_numbers_stand_beside_the_full_scale_alone(tmp_path: Path) -> None:
  """They come from the declared items."""
  for scale in ('cpu', 'full'):
    write_run(
      tmp_path / 'run' / 'fptt-kappa2', 'fptt-seed0', [], valid_ppl=21.0, test_ppl=19.0
    )
    collect_folder(tmp_path / 'run', 'table4', Origin(scale=scale), tmp_path)
  assert '106.3' in tables.table_of('table4/full', tmp_path)
  assert '106.3' not in tables.table_of('table4/cpu', tmp_path)


def growth_line(value: int) -> dict[str, float]:
  return {'value': value, 'median_ms': 2.0 * value, 'temp_mib': 1.0, 'compile_s': 1.0}


def test_reports_of_studies_and_benchmarks_are_rows(tmp_path: Path) -> None:
  """One row per line, its machine from the report; curves of the convergence study, and
  fits of growth, come along.
  """
  source = {'hardware': {'cpu_cores': 2}, 'rounds': 3}
  lines = [{'run': 'adam', 'distance': 0.5}, {'run': 'sgd', 'distance': 0.25}]
  (tmp_path / 'convergence.json').write_text(
    json.dumps({'item': 'convergence', 'scale': 'cpu', **source, 'lines': lines})
  )
  (tmp_path / 'adam-cpu.json').write_text(
    json.dumps([{'step': 1, 'distance': 1.5}, {'step': 2, 'distance': 0.5}])
  )
  out = tmp_path / 'out'
  out.mkdir()
  adam, sgd = collected(tmp_path, out, 'convergence', Origin()).rows
  assert (adam.numbers, adam.curves) == (
    {'distance': 0.5},
    {'step': [1, 2], 'distance': [1.5, 0.5]},
  )
  assert (sgd.numbers, sgd.curves, sgd.source) == ({'distance': 0.25}, {}, source)
  grown = [
    {'varied': name, **growth_line(value)} for name in 'TK' for value in (1, 2, 4)
  ]
  grown.append({'varied': 'fit', 'exponents': {'T': {'median_ms': 1.0}}, 'C': 0.5})
  report = {'runs': [{'part': 'growth', **source, 'lines': grown}]}
  (tmp_path / 'benchmark.json').write_text(json.dumps(report))
  rows = collected(tmp_path, out, 'benchmark', Origin(scale='own')).rows
  assert len(rows) == 7
  text = tables.table_of('benchmark', out)
  assert '| K | 4 | 8 |' in text
  assert (
    '| varied | exponents T median_ms | C |\n| --- | --- | --- |\n| fit | 1 | 0.5 |'
    in text
  )
  assert [
    path.stat().st_size > 5000
    for path in plots.draw('benchmark', tmp_path / 'plots', out)
  ] == [True]


def test_a_real_run_folder_is_collected(tmp_path: Path) -> None:
  """What `experiments.paper` writes at smoke scale, with the scale its report says and
  this machine.
  """
  config = Config(
    item='fig1', scale='smoke', workdir=str(tmp_path / 'run'), lines=('T12-tbptt',)
  )
  paper.main(config)
  out = tmp_path / 'out'
  out.mkdir()
  item = collected(tmp_path / 'run', out, origin=Origin())
  [row] = item.rows
  result = json.loads((tmp_path / 'run/T12-tbptt/tbptt-seed0/result.json').read_text())
  assert (row.numbers['test_mse'], row.status) == (result['test_mse'], 'done')
  assert item.series == {'smoke': {'scale': 'smoke', 'notes': ''}}
  assert {'hardware', 'versions', 'commit'} <= set(row.source)
  assert [path.name for path in plots.draw('fig1', tmp_path / 'plots', out)] == [
    'fig1-smoke-test_mse.png'
  ]


@pytest.mark.parametrize(
  ('damage', 'origin', 'message'),
  [
    ('none', Origin(), '--scale'),
    ('folder', CPU, '--collect.*run'),
    ('runs', CPU, '--collect.*run'),
    ('config', CPU, r'config\.json.*fptt-seed0'),
    ('result', CPU, r'result\.json'),
    ('metrics', CPU, r'metrics\.jsonl'),
  ],
)
def test_folders_without_results_are_refused(
  tmp_path: Path, damage: str, origin: Origin, message: str
) -> None:
  """By the name of what is wrong; nothing is written."""
  folder, out = tmp_path / 'run', tmp_path / 'out'
  out.mkdir()
  write_run(folder, 'fptt-seed0', [0.5])
  if damage == 'folder':
    folder = tmp_path / 'nowhere-run'
  elif damage == 'runs':
    folder = tmp_path / 'empty-run'
    folder.mkdir()
  elif damage == 'config':
    (folder / 'config.json').unlink()
  elif damage == 'result':
    (folder / 'fptt-seed0' / 'result.json').write_text('{"method": ')
  elif damage == 'metrics':
    (folder / 'fptt-seed0' / 'metrics.jsonl').write_text('nan?\n')
  with pytest.raises(UserError, match=message):
    collect_folder(folder, 'fig1', origin, out)
  assert not files(out)


def test_damaged_curves_are_named(tmp_path: Path) -> None:
  """Not taken for none."""
  write_run(tmp_path / 'run', 'fptt-seed0', [0.5])
  collected(tmp_path / 'run', tmp_path)
  (tmp_path / 'fig1.curves.jsonl.gz').write_bytes(gzip.compress(b'x')[:-4])
  with pytest.raises(UserError, match=r'fig1\.curves\.jsonl\.gz'):
    store.load('fig1', tmp_path)


@pytest.mark.parametrize(
  ('given_settings', 'message'),
  [
    ({}, '--collect'),
    ({'collect': 'runs/x'}, "--item.*''"),
    ({'tables': True, 'item': 'fig1'}, "--item.*'fig1'"),
    ({'tables': True, 'notes': 'Busy.'}, "--notes.*'Busy.'"),
    ({'collect': 'runs/x', 'item': 'fig9'}, "--item.*'fig9'"),
    ({'collect': 'runs/x', 'item': 'fig1', 'series': 'a/b'}, "--series.*'a/b'"),
    ({'collect': 'runs/x', 'item': 'fig1', 'scale': '../cpu'}, r"--scale.*'\.\./cpu'"),
  ],
)
def test_commands_of_no_meaning_are_refused(
  given_settings: dict[str, Any], message: str
) -> None:
  """Before anything is read."""
  with pytest.raises(ValueError, match=message):
    command.Config(**given_settings)


def test_the_command_collects_and_makes_tables(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  """What was asked for is done and said; pages whose tables are as they should be are
  left alone.
  """
  write_run(tmp_path / 'run', 'fptt-seed0', [0.5])
  out = tmp_path / 'out'
  out.mkdir()
  monkeypatch.setattr(store, 'FOLDER', out)
  command.main(
    command.Config(
      collect=str(tmp_path / 'run'), item='fig1', scale='short', notes='A note.'
    )
  )
  assert store.load('fig1', out).series == {
    'short': {'scale': 'short', 'notes': 'A note.'}
  }
  monkeypatch.undo()
  stale, whole = tmp_path / 'stale.md', tmp_path / 'whole.md'
  stale.write_text('<!-- table: products -->\nold\n<!-- end table -->\n')
  whole.write_text(tables.updated_text(stale.read_text()))
  assert tables.update_pages([stale, whole]) == [stale]
  assert stale.read_text() == whole.read_text()
  # The repository's pages are not to be rewritten by a test.
  monkeypatch.setattr(command, 'pages', lambda root: [])
  command.main(command.Config(tables=True))
  printed = capsys.readouterr().out.splitlines()
  assert printed == [
    f'1 rows of {tmp_path / "run"} are in fig1.json',
    'tables changed in: none',
  ]


def test_tables_are_put_between_their_markers() -> None:
  """What stands around them stays; a marker without results is named."""
  text = 'Before.\n<!-- table: fig1/full -->\nold\n<!-- end table -->\nAfter.\n'
  updated = tables.updated_text(text)
  assert updated.startswith('Before.\n<!-- table: fig1/full -->\n')
  assert updated.endswith('<!-- end table -->\nAfter.\n')
  assert 'old' not in updated
  assert tables.updated_text(updated) == updated
  with pytest.raises(UserError, match='fig9'):
    tables.updated_text(text.replace('fig1/full', 'fig9'))


def test_committed_tables_are_those_of_the_committed_results() -> None:
  """Every page is what `--tables` makes of it; every item is on the results' page."""
  pages = command.pages(ROOT)
  assert ROOT / 'docs' / 'reproduction' / 'results.md' in pages
  for page in pages:
    assert tables.updated_text(page.read_text()) == page.read_text(), page
  shown = tables.BLOCK.findall(
    (ROOT / 'docs' / 'reproduction' / 'results.md').read_text()
  )
  assert sorted(shown) == sorted([*store.item_names(), 'provenance'])


def test_committed_results_are_whole_and_small() -> None:
  """Few files; each row is unique, in order and complete; saving them again changes no
  byte; no folder of a machine is named.
  """
  kept = [
    path
    for path in store.FOLDER.rglob('*')
    if path.is_file() and '__pycache__' not in path.parts
  ]
  assert len(kept) <= 40
  assert sum(path.stat().st_size for path in kept) <= 3 * 2**20
  for name in store.item_names():
    item = store.load(name)
    keys = [row.key for row in item.rows]
    assert len(set(keys)) == len(keys)
    assert item.rows == sorted(item.rows, key=store.sort_key)
    assert {row.series for row in item.rows} == set(item.series)
    for row in item.rows:
      assert row.status in store.STATUSES
      assert row.settings
      assert row.status == 'unfinished' or row.source['versions']['jax']
      assert '--workdir' not in json.dumps(row.source)
      lengths = {len(values) for values in row.curves.values()}
      assert len(lengths) <= 1
    described = (store.FOLDER / f'{name}.json').read_text()
    assert '"/' not in described
    assert 'NaN' not in described


def test_saving_the_committed_results_changes_no_byte(tmp_path: Path) -> None:
  """The form is settled by the content alone."""
  for name in store.item_names():
    store.save(store.load(name), tmp_path)
  for path in tmp_path.glob('*.json'):
    assert path.read_bytes() == (store.FOLDER / path.name).read_bytes()
  for path in tmp_path.glob('*.gz'):
    committed = (store.FOLDER / path.name).read_bytes()
    assert gzip.decompress(path.read_bytes()) == gzip.decompress(committed)


@pytest.mark.parametrize('name', ['table1', 'convergence', 'fig1'])
def test_plots_are_drawn_of_the_committed_results(tmp_path: Path, name: str) -> None:
  """One per series and stage that has something to draw."""
  drawn = plots.draw(name, tmp_path)
  expected = sum(
    len({row.stage for row in rows}) for _, rows in store.by_series(store.load(name))
  )
  assert len(set(drawn)) == expected
  assert all(path.stat().st_size > 10_000 for path in drawn)


def test_plots_of_a_tournament_that_has_just_begun(tmp_path: Path) -> None:
  """No overview while there is nothing to compare, and an axis for any ratio."""
  row = store.Row(
    'cpu',
    'final',
    'recall.tbptt',
    'run',
    0,
    True,
    'done',
    {'method': 'tbptt', 'lr': 0.1},
    MACHINE,
    {'test_recall': 0.1},
    {'step': [1], 'test_recall': [0.1]},
  )
  series = {'cpu': {'scale': 'cpu', 'notes': ''}}
  store.save(store.Item('tournament', series, [row]), tmp_path)
  drawn = plots.draw('tournament', tmp_path / 'plots', tmp_path)
  assert not [path for path in drawn if 'overview' in path.name]
  for ratio in (100.0, 0.001):
    axes = Figure().subplots()
    plots.draw_ratios(axes, {0: contest.Standing(ratio, None, None, 'better')})
    left, right = axes.get_xlim()
    assert left < 1 < right


def test_the_overview_of_the_tournament_is_drawn(tmp_path: Path) -> None:
  """Of the committed results, as the documentation shows it."""
  rows = dict(store.by_series(store.load('tournament')))['cpu']
  drawn = plots.draw_standings(tmp_path / 'overview.png', rows)
  shown = ROOT / 'docs' / '_static' / 'tournament.png'
  drawn_image, shown_image = mpimg.imread(drawn), mpimg.imread(shown)
  assert drawn_image.shape == shown_image.shape
  assert drawn_image[..., :3].std() > 0.1
  # Versions of Matplotlib and of its fonts differ by less.
  assert np.abs(drawn_image - shown_image).mean() < 0.01


def test_a_run_records_its_command_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
  """Without what only this machine knows; None where it is no script of ours."""
  monkeypatch.setattr(
    sys.modules['__main__'],
    '__spec__',
    dataclasses.make_dataclass('Spec', ['name'])('experiments.add_task'),
  )
  monkeypatch.setattr(
    sys,
    'argv',
    [
      'x',
      '--seeds=0:3',
      '--workdir=/a',
      '--data_dir',
      '/b',
      '--notes',
      'a b',
      '--nodecay',
    ],
  )
  assert (
    flags.command()
    == "python -m experiments.add_task --seeds=0:3 --notes 'a b' --nodecay"
  )
  found = environment.describe_machine()
  assert found['command'] == flags.command()
  head = subprocess.run(
    ['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=False
  ).stdout.strip()
  assert (found['commit'] or '').removesuffix('-dirty') == head[:12]
  monkeypatch.setattr(sys.modules['__main__'], '__spec__', None)
  assert flags.command() is None
