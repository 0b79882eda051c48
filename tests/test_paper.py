"""One command a table: the declared items, tuning, resuming, the table itself."""

import dataclasses
import json
from pathlib import Path
import shutil
import subprocess
import sys
from typing import Any

import jax
import pytest
from scipy import stats

from experiments.core.comparison import interval
from experiments.core.flags import UserError
from experiments.paper import __main__ as paper
from experiments.paper import (
  costs,
  entries,
  items,
  quoted,
  settings,
  studies,
  tables,
  tuning,
)
import fptt_jax


def run(item: str, folder: Path, **given: Any) -> None:
  paper.main(settings.Config(item=item, scale='smoke', workdir=str(folder), **given))


@pytest.mark.parametrize('scale', items.SCALES)
@pytest.mark.parametrize('item', list(items.ITEMS))
def test_every_item_declares_lines_that_mean_something(item: str, scale: str) -> None:
  """Configurations are valid, names are unique and fit for folders; each has the
  windows without the regularizer.
  """
  lines = items.ITEMS[item](scale)
  labels = [entry.label for entry in lines]
  assert len(set(labels)) == len(labels)
  assert not any(set(label) & set('/ ') for label in labels)
  methods = {entry.config.method[0] for entry in lines}
  assert {'fptt', 'tbptt'} <= methods <= set(fptt_jax.METHODS)
  assert all(len(entry.config.method) == 1 for entry in lines)
  if scale == 'smoke' or (scale == 'cpu' and item != 'online'):
    assert all(entry.paper is None and not entry.replication for entry in lines)
  # Cut to as many steps as a sequence has, truncated BPTT would be BPTT.
  shortest = {'smoke': 6, 'cpu': 28, 'short': 784, 'full': 784}[scale]
  assert all(
    (entry.config.truncation_steps or 300) < shortest
    for entry in lines
    if entry.config.method == ('tbptt_final',)
  )


def test_full_scale_is_the_paper_s() -> None:
  """Two-sided check of what the numbers stand beside: T, H, K, and Tables 2, 4, 5,
  6.
  """
  lines = {
    (item, entry.label): entry
    for item in items.ITEMS
    for entry in items.ITEMS[item]('full')
  }
  assert {
    line.config.seq_len for (item, _), line in lines.items() if item == 'fig3'
  } == {750, 1000}
  assert {
    line.config.num_windows for (item, _), line in lines.items() if item == 'fig2'
  } == {None, 1, 3, 5, 10, 100, 200}
  assert {
    line.config.alpha
    for (item, label), line in lines.items()
    if item == 'alpha' and 'fptt' in label
  } == set(items.ALPHAS)
  quoted = {
    ('table2', 'gru-fptt'): 71.37,
    ('table3', 'bptt-aux'): 65.65,
    ('table4', 'fptt-kappa2'): 106.27,
    ('table5', 'ptb_w-fptt'): 50.96,
    ('table6', 'permuted-fptt'): 94.75,
  }
  assert {key: lines[key].paper for key in quoted} == quoted
  assert {
    line.config.epochs
    for (item, _), line in lines.items()
    if item in ('table4', 'alpha')
  } == {100}
  characters = lines['table5', 'ptb_c-fptt'].config
  assert (
    characters.hidden,
    characters.last_hidden,
    characters.seq_len,
    characters.num_windows,
  ) == (1000, 200, 150, 3)
  assert (
    characters.lr,
    characters.epochs,
    characters.milestones,
    characters.kappa,
  ) == (2e-3, 500, (300, 400), 2.0)
  image = lines['table6', 'mnist-fptt'].config
  assert (
    image.hidden,
    image.num_windows,
    image.alpha,
    image.lr,
    image.clip,
    image.epochs,
  ) == (128, 10, 0.1, 1e-3, 1.0, 200)
  assert lines['table2', 'antisymmetric-fptt'].config.hidden == 256
  word = lines['table5', 'ptb_w-fptt'].config
  assert (
    word.hidden,
    word.embedding,
    word.last_hidden,
    word.experts,
    word.lr,
    word.beta,
  ) == (960, 280, 620, 15, 20.0, 0.7)


@pytest.mark.parametrize(
  ('item', 'lines'),
  [
    ('fig2', ('tbptt-K3', 'fptt-K3-alpha0.5')),
    pytest.param('table6', ('mnist-tbptt_final', 'mnist-fptt'), marks=pytest.mark.slow),
  ],
)
def test_an_item_runs_and_goes_on_where_it_was_stopped(
  tmp_path: Path, capsys: pytest.CaptureFixture[str], item: str, lines: tuple[str, ...]
) -> None:
  """Table as text and JSON with a line each, a plot; again with one more seed, only
  that seed is run, and both are in the table.
  """
  run(item, tmp_path, lines=lines[:1])
  run(item, tmp_path, lines=lines)
  [table] = tmp_path.glob(f'{item}-test_*.json')
  assert [line['line'] for line in json.loads(table.read_text())['lines']] == list(
    lines
  )
  assert table.with_suffix('.png').stat().st_size > 10_000
  before = {
    path: path.stat().st_mtime_ns for path in tmp_path.glob('*/*-seed0/metrics.jsonl')
  }
  capsys.readouterr()
  run(item, tmp_path, lines=lines, seeds=(0, 1))
  assert {path: path.stat().st_mtime_ns for path in before} == before
  again = json.loads(table.read_text())['lines']
  assert [(line['seeds'], line['tuned']) for line in again] == [(2, 'no')] * 2
  printed = capsys.readouterr().out
  assert "not the paper's" in printed
  assert table.with_suffix('.txt').read_text().splitlines()[1] in printed
  assert table.with_suffix('.txt').read_text().count(' 0.001 ') == len(
    lines
  )  # The learning rate, not rounded away.


def test_the_interval_is_student_s() -> None:
  """Mean ± t(0.975, n - 1) s/√n, as scipy has it; none for one value."""
  values = [3.0, 4.0, 8.0]
  low, high = stats.t.interval(0.95, 2, loc=5.0, scale=stats.sem(values))
  assert interval(values) == pytest.approx((high - low) / 2)
  assert interval([1.0]) is None


def test_tuning_chooses_by_validation_and_later_runs_use_it(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Each declared rate is tried from a seed nothing else has; the best score's rate is
  kept and then run with.
  """
  run('table4', tmp_path, lines=('tbptt',), tune=True)
  # Neither a score nor the number of windows, of which the line has no others.
  assert 'diverged' not in capsys.readouterr().out
  tuned = json.loads((tmp_path / 'tuned.json').read_text())['tbptt']
  scores = {trial['lr']: trial['score'] for trial in tuned['tried']}
  assert set(scores) >= {2.0, 1.0, 0.5, 0.25}
  assert tuned['valid_ppl'] == min(scores.values()) == scores[tuned['lr']]
  inside = min(scores) < tuned['lr'] < max(scores)
  assert inside or len(scores) == tuning.MAX_RATES
  tried = {f'tbptt-seed{settings.TUNE_SEED}-lr{rate:g}' for rate in scores}
  results = {
    path.parent.name: json.loads(path.read_text())
    for path in tmp_path.glob('tune/tbptt/*/result.json')
  }
  assert set(results) == tried
  assert {result['test_ppl'] for result in results.values()} == {
    None
  }  # The test text is not looked at.
  assert (tmp_path / 'tuning-valid_ppl.png').stat().st_size > 5000
  run('table4', tmp_path, lines=('tbptt',), tune=True)
  assert {
    path.parent.name for path in tmp_path.glob('tune/tbptt/*/result.json')
  } == tried  # From the setting chosen, the same grid.
  run('table4', tmp_path, lines=('tbptt',))
  assert (
    json.loads((tmp_path / 'tbptt' / 'config.json').read_text())['lr'] == tuned['lr']
  )
  printed = [line.split() for line in capsys.readouterr().out.splitlines()]
  [(header, row)] = [
    (printed[n - 2], row)
    for n, row in enumerate(printed)
    if row[:2] == ['tbptt', 'tbptt']
  ]
  assert row[header.index('lr')] == f'{tuned["lr"]:g}'
  assert row[header.index('tuned')] == 'yes'


def test_a_grid_whose_best_rate_is_at_an_end_is_extended() -> None:
  """By the next rate of the ladder on that side; a best rate inside ends the search."""
  entry = items.table6('cpu')[0]
  assert items.next_rate(entry, (3e-3, 1e-3, 3e-4), 3e-3) == 1e-2
  assert items.next_rate(entry, (3e-3, 1e-3, 3e-4), 3e-4) == 1e-4
  assert items.next_rate(entry, (3e-3, 1e-3, 3e-4), 1e-3) is None


def test_a_grid_that_learns_nothing_is_extended_upwards(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The best of scores at chance is best by accident, so it does not end the search."""
  scores = {1e-3: 0.1590, 3e-2: 0.002, 1e-1: 0.1591}

  def run_entry(entry: items.Entry, config: Any, folder: Path) -> list[dict[str, Any]]:
    rates = [chosen['lr'] for chosen, _ in config.variants()]
    return [{'lr': rate, 'test_mse': scores.get(rate, 0.1596)} for rate in rates]

  monkeypatch.setattr(tuning, 'run_entry', run_entry)
  trials = tuning.try_rates(items.fig1('cpu')[0], None, tmp_path)
  assert {trial['lr'] for trial in trials} == {3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1}
  scores[3e-2] = 0.1592
  trials = tuning.try_rates(items.fig1('cpu')[0], None, tmp_path)
  assert max(trial['lr'] for trial in trials) == 3e-1


@pytest.mark.parametrize(
  ('score', 'chance', 'better'),
  [
    (items.ERROR, 0.16, 0.14),
    (items.ACCURACY, 11.35, 18.0),
    (items.CREDIT['recall'], 0.083, 0.06),
    (items.CREDIT['henon'], 1.0, 0.5),
  ],
)
def test_scores_know_chance(score: items.Score, chance: float, better: float) -> None:
  """In either direction, and not where windows alone are little better."""
  assert score.is_chance(chance)
  assert not score.is_chance(better)
  assert not items.CREDIT['lags'].is_chance(0.66)


@pytest.mark.parametrize('name', items.ITEMS)
@pytest.mark.parametrize('scale', ['cpu', 'short'])
def test_a_search_may_go_down_to_the_end_of_the_ladder(name: str, scale: str) -> None:
  """No setting of a line forbids low rates."""
  for entry in items.ITEMS[name](scale):
    if entry.can_tune:
      items.grid(entry, (min(items.RATE_LADDER[entry.config.optimizer]),))


def test_a_grid_that_diverges_is_extended_downwards(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A rate at which a run diverged is never the best, whatever its weights had learned
  before.
  """

  def run_entry(entry: items.Entry, config: Any, folder: Path) -> list[dict[str, Any]]:
    rates = [chosen['lr'] for chosen, _ in config.variants()]
    scores = {3e-5: 0.02, 1e-5: 0.03}
    lost = dict(test_mse=0.001, lost='gradient norm is inf')
    return [
      {'lr': rate, **({'test_mse': scores[rate]} if rate in scores else lost)}
      for rate in rates
    ]

  monkeypatch.setattr(tuning, 'run_entry', run_entry)
  trials = tuning.try_rates(items.fig1('cpu')[0], None, tmp_path)
  scores = {trial['lr']: trial['score'] for trial in trials}
  assert scores == {
    **dict.fromkeys((3e-3, 1e-3, 3e-4, 1e-4)),
    **{3e-5: 0.02, 1e-5: 0.03},
  }


def test_tuning_at_scale_short_tries_numbers_of_windows(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Each K has its own grid; the best of all is kept with its K, and later runs have
  both.
  """
  scores = {(10, 1e-3): 90.0, (28, 3e-3): 91.0}

  def run_entry(entry: items.Entry, config: Any, folder: Path) -> list[dict[str, Any]]:
    rates = [chosen['lr'] for chosen, _ in config.variants()]
    found = [scores.get((config.num_windows, rate), 50.0) for rate in rates]
    return [
      {'lr': rate, 'valid_accuracy': score}
      for rate, score in zip(rates, found, strict=True)
    ]

  monkeypatch.setattr(tuning, 'run_entry', run_entry)
  config = settings.Config(
    item='table6',
    scale='short',
    lines=('mnist-fptt',),
    workdir=str(tmp_path),
    tune=True,
  )
  paper.main(config)
  tuned = entries.read_tuned(tmp_path)['mnist-fptt']
  assert (tuned['lr'], tuned['num_windows'], len(tuned['tried'])) == (
    3e-3,
    28,
    7,
  )  # The second grid got 1e-2, too.
  [entry] = entries.chosen_entries(dataclasses.replace(config, tune=False), tmp_path)
  assert (entry.config.lr, entry.config.num_windows) == (3e-3, 28)
  assert (entry.config.epochs, entry.config.decay, entry.config.milestones) == (
    30,
    True,
    (),
  )


def test_trials_of_the_adding_problem_are_half_as_long_at_scale_short() -> None:
  """At scale 'cpu' they are as long as the runs; what runs after --tune is whole."""
  for scale, batches, trial_batches in (('short', 3000, 1500), ('cpu', 1500, 1500)):
    for entry in items.fig1(scale):
      assert entry.config.batches == batches
      assert items.grid(entry, (1e-2,)).batches == trial_batches


def test_tuning_again_tries_the_same_rates_off_the_common_grid(
  tmp_path: Path,
) -> None:
  """PTB-c's 2e-3 and its halves, whatever was chosen before."""
  rates = lambda entry: {
    candidate.lr
    for _, candidate in items.grid(entry, items.first_rates(entry)).variants()
  }
  declared = rates(items.table5('smoke')[0])
  assert declared == {2e-3, 1e-3, 5e-4}
  (tmp_path / 'tuned.json').write_text(json.dumps({'ptb_c-bptt': {'lr': 1e-3}}))
  for tune, expected in ((True, declared), (False, {3e-3, 1e-3, 3e-4})):
    config = settings.Config(
      item='table5', scale='smoke', lines=('ptb_c-bptt',), tune=tune
    )
    [entry] = entries.chosen_entries(config, tmp_path)
    assert rates(entry) == expected


def test_runs_of_other_settings_go_on_if_told_to(tmp_path: Path) -> None:
  """An item's folder whose lines began under another rate."""
  run('fig1', tmp_path, lines=('T12-tbptt',))
  (tmp_path / 'tuned.json').write_text(json.dumps({'T12-tbptt': {'lr': 3e-3}}))
  with pytest.raises(
    UserError, match=r'lr: was 0\.001, now 0\.003.*--allow_config_change'
  ):
    run('fig1', tmp_path, lines=('T12-tbptt',))
  # The run has ended, and its weights must not be reported at another rate.
  with pytest.raises(UserError, match=r'tbptt-seed0 is finished.*lr: was 0\.001'):
    run('fig1', tmp_path, lines=('T12-tbptt',), allow_config_change=True)
  shutil.rmtree(tmp_path / 'T12-tbptt' / 'tbptt-seed0')
  run('fig1', tmp_path, lines=('T12-tbptt',), allow_config_change=True)
  [override] = json.loads((tmp_path / 'T12-tbptt' / 'config.json').read_text())[
    'overrides'
  ]
  assert override['differences'] == ['lr: was 0.001, now 0.003']


def test_a_line_whose_test_data_are_fixed_is_not_tuned(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  """The years of the test are the same for every seed, that of tuning included."""
  [line] = [one for one in items.credit('cpu') if one.label == 'sunspots-tbptt-rtrl']
  monkeypatch.setattr(tuning, 'try_rates', None)
  tuning.tune(settings.Config(item='online'), [line], tmp_path)
  assert 'sunspots-tbptt-rtrl: not tuned' in capsys.readouterr().out
  assert not (tmp_path / 'tuned.json').exists()
  [other] = [one for one in items.credit('cpu') if one.label == 'lags-tbptt-rtrl']
  assert other.can_tune


@pytest.mark.parametrize('scale', items.SCALES)
def test_products_are_compared_in_equal_runs(scale: str) -> None:
  """Each pair of lines differs in --products alone."""
  lines = items.products(scale)
  for full, rounded in zip(lines[::2], lines[1::2], strict=True):
    assert (full.config.products, rounded.config.products) == ('float32', 'bfloat16')
    assert dataclasses.replace(full.config, products='bfloat16') == rounded.config


@pytest.mark.parametrize('scale', items.SCALES)
def test_no_line_ends_for_its_rate(scale: str) -> None:
  """At each rate of its grid a line's rate stays, after all milestones, where training
  goes on.
  """
  for item in items.ITEMS.values():
    for config in (
      config
      for entry in item(scale)
      for _, config in items.grid(entry, items.first_rates(entry)).variants()
    ):
      if hasattr(config, 'milestones'):
        assert (
          config.lr / config.milestone_factor ** len(config.milestones) >= config.min_lr
        )


def test_several_seeds_are_averaged(tmp_path: Path) -> None:
  """The line's mean and interval are those of the runs' results."""
  run('fig1', tmp_path, lines=('T12-tbptt',), seeds=(0, 1, 2))
  results = [
    json.loads(path.read_text())['test_mse']
    for path in sorted(tmp_path.glob('T12-tbptt/*/result.json'))
  ]
  [line] = json.loads((tmp_path / 'fig1-test_mse.json').read_text())['lines']
  assert (line['seeds'], line['diverged']) == (3, 0)
  assert line['test_mse'] == pytest.approx(sum(results) / 3)
  assert line['± test_mse'] == pytest.approx(interval(results))


def test_a_run_that_diverged_is_counted_and_left_out_of_the_mean() -> None:
  """One of three seeds without a result, and one with a score of the weights before."""
  entry = items.fig1('smoke')[0]
  summaries = [
    dict(test_mse=0.5, K=3, seconds=1.0, seed=0),
    dict(test_mse=None, K=3, seconds=1.0, seed=1),
    dict(test_mse=0.1, K=3, seconds=1.0, seed=2, lost='gradient norm is inf'),
  ]
  line = tables.table_row(entry, summaries, ['test_mse'], None)
  assert (line['test_mse'], line['seeds'], line['diverged'], line['± test_mse']) == (
    0.5,
    3,
    2,
    None,
  )


@pytest.mark.parametrize(
  ('windows', 'lr', 'expected'),
  [
    (10, 0.1, 'yes, the highest tried'),
    (10, 0.001, 'yes, the lowest tried'),
    (10, 0.01, 'yes'),
    (28, 0.01, 'yes, the highest tried'),
  ],
)
def test_a_tuned_rate_at_an_end_of_its_grid(
  windows: int, lr: float, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
  """Each number of windows has a grid of its own. Tuning prints it, too."""
  tried = [
    {'lr': rate, 'num_windows': 10, 'score': 0.05} for rate in (0.1, 0.01, 0.001)
  ] + [{'lr': rate, 'num_windows': 28, 'score': None} for rate in (0.01, 0.001)]
  tuned = {'lr': lr, 'num_windows': windows, 'tried': tried}
  summaries = [dict(test_mse=0.5, K=windows, seconds=1.0, seed=0)]
  line = tables.table_row(items.fig1('smoke')[0], summaries, ['test_mse'], tuned)
  assert line['tuned'] == expected
  best = {'line': 'a', 'lr': lr, 'num_windows': windows}
  tuning._remark_on_edge(tried, best)
  edge = expected.removeprefix('yes').removeprefix(', ')
  said = f'a, K={windows}: the best learning rate, {lr:g}, is {edge}'
  printed = capsys.readouterr().out
  assert printed.startswith(said) if edge else printed == ''


@pytest.mark.parametrize(
  'first', [0, 1], ids=['the first line diverged', 'the last line diverged']
)
def test_numbers_stay_in_their_columns_where_a_line_has_no_result(
  tmp_path: Path, capsys: pytest.CaptureFixture[str], first: int
) -> None:
  """A diverged run has no perplexity by dynamic evaluation, others have; parameters,
  intervals and quotes are in the table too.
  """
  lines = [
    entry
    for entry in items.table5('full')
    if entry.label in ('ptb_w-bptt', 'ptb_w-fptt')
  ]
  alike = dict(
    method='fptt',
    K=3,
    seconds=60.0,
    parameters=2_000,
    recurrent_parameters=1_000,
    run='fptt-seed0',
  )
  bad, good = (
    alike | dict(test_ppl=None),
    alike | dict(test_ppl=70.0, dynamic_test_ppl=55.0),
  )
  for entry in lines:
    (tmp_path / entry.label / 'fptt-seed0').mkdir(parents=True)
    (tmp_path / entry.label / 'fptt-seed0' / 'metrics.jsonl').write_text(
      '{"step": 1, "valid_ppl": 90.0}\n'
    )
  results = [[bad], [good, good | dict(test_ppl=72.0, dynamic_test_ppl=59.0)]]
  tables.write_tables(
    settings.Config(item='table5', scale='full'),
    lines,
    results if first == 0 else results[::-1],
    tmp_path,
  )
  content = json.loads((tmp_path / 'table5-test_ppl.json').read_text())
  lines = content['lines'] if first == 0 else content['lines'][::-1]
  assert [line['diverged'] for line in lines] == [1, 0]
  assert [line['test_ppl'] for line in lines] == [None, 71.0]
  assert [line['dynamic_test_ppl'] for line in lines] == [None, 57.0]
  assert lines[1]['± dynamic_test_ppl'] == pytest.approx(interval([55.0, 59.0]))
  assert [line['paper'] for line in content['lines']] == [51.9, 50.96]
  assert (lines[1]['parameters'], lines[1]['recurrent']) == (2_000, 1_000)
  assert content['quoted'] == quoted.QUOTED['table5']
  text = (tmp_path / 'table5-test_ppl.txt').read_text()
  assert text.splitlines()[1] in capsys.readouterr().out
  header, _, *rows = text.splitlines()[1:5]
  for number, title in (
    ('71.00', '  test_ppl'),
    ('57.00', '  dynamic_test_ppl'),
    ('1000', '  recurrent'),
  ):
    assert rows[1 if first == 0 else 0][: header.index(title) + len(title)].endswith(
      number
    ), title
  assert 'the paper quotes, PTB-c bits per character: TrellisNet 1.158' in text


@pytest.mark.parametrize(
  'study',
  [
    pytest.param(
      study, marks=pytest.mark.slow if study in ('convergence', 'costs') else ()
    )
    for study in studies.STUDIES
  ],
)
def test_studies_run(tmp_path: Path, study: str) -> None:
  """Numbers as text and JSON, with the machine they were measured on."""
  run(study, tmp_path)
  content = json.loads((tmp_path / f'{study}.json').read_text())
  assert len(content['lines']) >= 2
  assert content['hardware']['cpu_cores']
  if study == 'costs':
    assert all(line['batch_ms'] > 0 for line in content['lines'])
  if study == 'walltime':  # Eight batches of eight an epoch.
    for line in content['lines']:
      assert line['epoch_s'] == pytest.approx(
        8e-3 * (line['gradient_ms'] + line['update_ms'])
      )


@pytest.mark.slow
@pytest.mark.parametrize('item', list(items.ITEMS))
def test_every_item_runs_whole_at_smoke_scale(tmp_path: Path, item: str) -> None:
  """All lines of all items. PTB-w's settings, the release's, are past what the advisor
  and `fptt` hold for stable: they say so.
  """
  if item == 'table5':
    with (
      pytest.warns(UserWarning, match='beta=0.7 > 0.5 extrapolates'),
      pytest.warns(UserWarning, match=r'spectral radius 1\.55 > 1'),
    ):
      run(item, tmp_path)
  else:
    run(item, tmp_path)
  assert list(tmp_path.glob(f'{item}-test_*.png'))


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (dict(methods=('fptp',)), r"--methods must be .*, got 'fptp'"),
    (
      dict(seeds=(1000,)),
      r'--seeds must be .*, got \(1000,\)',
    ),
    (dict(seeds=()), '--seeds must be .*, got'),
    (dict(seeds=(0, 1), tune=True), '--seeds must be left out with --tune, .*, 1'),
    (dict(seeds=(1, 1)), r'--seeds must be .*, got \(1, 1\)'),
    (
      dict(item='walltime', methods=('fptt',)),
      r"--methods must be .*, got \('fptt',\)",
    ),
    (
      dict(item='convergence', seeds=(1,)),
      r'--seeds must be .*, got \(1,\)',
    ),
    (
      dict(item='table1', allow_config_change=True),
      '--allow_config_change must be .*, got True',
    ),
    (dict(item='table1', tune=True), '--tune must be false with --item=table1'),
  ],
)
def test_settings_of_no_meaning_are_refused(
  given: dict[str, Any], message: str
) -> None:
  """Before anything runs."""
  with pytest.raises(ValueError, match=message):
    settings.Config(**given)


def test_lines_may_be_patterns(tmp_path: Path) -> None:
  config = settings.Config(
    item='table6', scale='cpu', lines=('mnist-?bptt', 'cifar10-f*')
  )
  chosen = entries.chosen_entries(config, tmp_path)
  assert [entry.label for entry in chosen] == ['mnist-tbptt', 'cifar10-fptt']


def test_lines_that_are_not_there_are_refused(tmp_path: Path) -> None:
  """The message lists those that are."""
  with pytest.raises(
    UserError,
    match=r'--lines must be .*, got nosuch',
  ):
    run('table4', tmp_path, lines=('nosuch',))
  with pytest.raises(
    UserError, match='--methods=ogd and --lines=all leave no line of table4'
  ):
    run('table4', tmp_path, methods=('ogd',))


def test_command_line_help() -> None:
  """Items and scales are told."""
  shown = subprocess.run(
    [sys.executable, '-m', 'experiments.paper', '--help'],
    capture_output=True,
    text=True,
    check=False,
  ).stdout
  for word in ('fig1', 'table5', 'convergence', 'smoke', '--tune'):
    assert word in shown, word


def test_costs_are_measured_on_data_of_the_shapes_of_each_task() -> None:
  """A batch of each script's task as its runs have it; `tbptt` is 1 by definition."""
  lines = {entry.label: entry for entry in items.tournament_of('cpu')}
  shapes = {
    'recall.tbptt': (100, 16, 32),
    'adding-K10.tbptt': (200, 32, 2),
    'permuted-rows.tbptt': (28, 100, 28),
    'pooled-pixels.tbptt': (196, 100, 1),
    'ptb_c.tbptt': (150, 16),
    'ptb300.tbptt': (300, 16),
  }
  for label, shape in shapes.items():
    task = costs.make_task(lines[label], 2)
    portion = next(iter(task.portions(1, 0)))
    assert len(jax.tree.leaves(portion.items)[0]) >= 2
    item = jax.tree.map(lambda leaf: leaf[0], portion.items)
    batch = jax.eval_shape(task.read, task.source, item)
    assert batch.inputs.shape == shape, label
  smoke = {entry.label: entry for entry in items.tournament_of('smoke')}
  chosen = [smoke[f'recall.{name}'] for name in ('tbptt', 'momentum0')]
  rows = costs.measure(chosen, 2, 3)
  assert [row['method'] for row in rows] == ['tbptt', 'momentum0']
  assert all(row['batch_ms'] > 0 for row in rows)
  # One program each, of the same size.
  assert 0.01 < rows[1]['relative'] < 100
