"""Plots of runs, while they are trained and afterwards, and their report in words."""

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any

from interruption import interrupted_at
from matplotlib.colors import to_rgb
import pytest
from test_images import make_config
from test_language_model import write_text

from experiments import add_task, images, language_model
from experiments.core import intervals, plotting, report, workdir
from experiments.core.plotting import Curve
import fptt_jax

TINY = dict(seq_len=8, hidden=2, batch_size=4, batches=4, eval_every=1, test_size=8)


def test_a_method_has_one_color_in_every_panel() -> None:
  """Its seeds share a line style too, its variants do not; other methods have other
  colors. All is titled.
  """
  curves = [
    Curve('fptt', 'fptt', [1, 2], [0.1, 0.2]),
    Curve('fptt', 'fptt', [1, 2], [0.1, None]),
    Curve('fptt alpha 1', 'fptt', [1, 2], [0.1, 0.2]),
    Curve('bptt', 'bptt', [1, 2], [0.3, 0.2]),
  ]
  panels = {'batches': curves, 'seconds': curves[::-1]}
  figure = plotting.curves_figure(
    panels, 'Adding problem', 'test MSE', {'chance': 0.17}
  )
  assert figure.get_suptitle() == 'Adding problem'
  assert [axes.get_title() for axes in figure.axes] == [
    'against batches',
    'against seconds',
  ]
  first, second = (
    [to_rgb(line.get_color()) for line in axes.lines] for axes in figure.axes
  )
  assert first[0] == first[1] == to_rgb(plotting.METHOD_COLORS['fptt'])
  assert first[3] == second[0] == to_rgb(plotting.METHOD_COLORS['bptt'])
  assert first[2] != first[0]
  styles = [line.get_linestyle() for line in figure.axes[0].lines]
  assert styles[0] == styles[1] != styles[2]
  labels = [text.get_text() for text in figure.legends[0].get_texts()]
  assert sorted(labels) == ['bptt', 'chance', 'fptt', 'fptt alpha 1']
  colors = [to_rgb(plotting.METHOD_COLORS[name]) for name in fptt_jax.METHODS]
  assert len(set(colors)) == len(fptt_jax.METHODS)


def test_percentages_have_a_linear_axis() -> None:
  curve = Curve('fptt', 'fptt', [1, 2], [10.0, 20.0])
  scales = [
    plotting.curves_figure({'epoch': [curve]}, 'MNIST', label, {}).axes[0].get_yscale()
    for label in ('accuracy, %', 'perplexity')
  ]
  assert scales == ['linear', 'log']


def adding(folder: Path, run: Path) -> Any:
  config = add_task.Config(method=('bptt',), workdir=str(run), **TINY)
  return lambda: add_task.main(config)


def epochs_of_images(folder: Path, run: Path) -> Any:
  return lambda: images.main(make_config(folder, method=('bptt',), workdir=str(run)))


def epochs_of_text(folder: Path, run: Path) -> Any:
  shape = dict(
    task='text', seq_len=10, batch_size=4, embedding=4, hidden=4, epochs=2, lr=1.0
  )
  config = language_model.Config(
    data_dir=str(write_text(folder)), method=('bptt',), workdir=str(run), **shape
  )
  return lambda: language_model.main(config)


@pytest.mark.parametrize(
  ('script', 'file'),
  [
    (adding, 'convergence.png'),
    (epochs_of_images, 'accuracy.png'),
    (epochs_of_text, 'valid_ppl.png'),
  ],
)
def test_a_plot_is_there_from_the_first_evaluation_on(
  tmp_path: Path, script: Callable[[Path, Path], Callable[[], None]], file: str
) -> None:
  """All three scripts draw it before the first checkpoint is saved."""
  main = script(tmp_path, tmp_path / 'run')
  with interrupted_at(1):
    main()
  assert (tmp_path / 'run' / file).read_bytes().startswith(b'\x89PNG')


def test_a_live_plot_takes_little_time(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """It is drawn again after a pause alone, a longer one when drawing is slow."""
  now = [0.0]

  def draw(*_: Any) -> None:
    drawn.append(now[0])
    now[0] += 2

  drawn: list[float] = []
  monkeypatch.setattr(plotting, 'draw', draw)
  monkeypatch.setattr(plotting.time, 'monotonic', lambda: now[0])
  plot = plotting.LivePlot(tmp_path, add_task.Config(), add_task.PLOT)
  for _ in range(100):
    plot()
    now[0] += 1
  pause = 2 + 2 * plotting.REDRAW_SHARE
  assert drawn == [0, pause, 2 * pause]


def test_the_announcement_names_runs_and_time(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Each run that is left with its rates, the time of each method and of all; nothing
  once all have ended.
  """
  config = add_task.Config(method=('tbptt', 'bptt'), **TINY)
  add_task.announce(config, tmp_path)
  said = capsys.readouterr().out
  for method in config.method:
    own = add_task.TUNED.methods[method]
    assert f'{method} seed 0: lr {own.lr:g}, momentum {own.momentum:g}\n' in said
    assert f'{method} takes about ' in said
  assert ' in total' in said
  _, summaries = add_task.run(
    dataclasses.replace(config, method=('bptt',)), str(tmp_path)
  )
  capsys.readouterr()
  add_task.announce(dataclasses.replace(config, method=('bptt',)), tmp_path)
  assert capsys.readouterr().out == ''
  assert summaries[0]['lr'] == add_task.TUNED.methods['bptt'].lr


def test_durations_are_in_words() -> None:
  assert [add_task.duration(seconds) for seconds in (0.4, 59.4, 59.6, 185)] == [
    '0 s',
    '59 s',
    '1 min 0 s',
    '3 min 5 s',
  ]


def test_a_summary_takes_the_mean_of_the_last_quarter() -> None:
  """Not the last point, nor the lowest; a run that diverged has none."""
  errors = [0.5, 0.4, 0.3, 0.001, 0.009, 0.3, 0.02, 0.04]
  rows = [
    dict(step=10 * number, updates=10 * number, seconds=1.0, test_mse=error)
    for number, error in enumerate(errors, start=1)
  ]
  summary = intervals.summarize(3, rows, 'test_mse')
  assert summary['last_quarter_mse'] == pytest.approx(0.03)
  assert summary['test_mse'] == 0.04
  unknown = [*rows[:-1], rows[-1] | {'test_mse': None}]
  assert intervals.summarize(3, unknown, 'test_mse')['last_quarter_mse'] is None


def test_a_run_that_diverged_has_no_score() -> None:
  """Its last weights may be finite, if the gradient alone was not."""
  rows = [dict(step=10, updates=10, seconds=1.0, test_mse=0.3)]
  summary = intervals.summarize(3, rows, 'test_mse', 'gradient norm is inf')
  assert summary['test_mse'] is None
  assert summary['last_quarter_mse'] is None
  assert summary['lost'] == 'gradient norm is inf'


@pytest.mark.parametrize(
  ('seeds', 'scores', 'expected'),
  [
    (
      (0,),
      [0.02, 0.01],
      '0.0100 for bptt, 0.0200 for fptt; chance is 0.167; this is one seed',
    ),
    ((0,), [0.02, None], '0.0200 for fptt, none (diverged) for bptt; '),
    (
      (0, 1, 2),
      [0.02, 0.02, 0.05, 0.01, 0.01, 0.06],
      '; bptt was the lowest from 2 of 3 seeds.',
    ),
    (
      (0, 1),
      [0.02, 0.04, 0.01, None],
      '0.0300 for fptt, none (diverged) for bptt; chance is 0.167; fptt was the '
      'lowest from 1 of 2',
    ),
  ],
)
def test_the_conclusion_says_what_was_seen(
  seeds: tuple[int, ...], scores: list[float | None], expected: str
) -> None:
  """Two sentences, the better method first, with what its order is worth."""
  config = add_task.Config(method=('fptt', 'bptt'), seeds=seeds)
  compared, seen = add_task.conclusion(
    config, [{'last_quarter_mse': score} for score in scores]
  ).split('\n')
  for method in config.method:
    assert (
      f'{method} ({add_task.settings_in_words(config.for_method(method))})' in compared
    )
  assert expected in seen


def test_one_run_is_compared_with_nothing() -> None:
  said = add_task.conclusion(
    add_task.Config(method=('fptt',)), [{'last_quarter_mse': 0.5}]
  )
  assert 'nothing else was run' in said


def test_a_report_prints_small_rates(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """A rate of 3e-5 is not rounded to the digits of the errors."""
  config = add_task.Config(method=('bptt',), lr=3e-5, momentum=0.0)
  workdir.open_workdir(str(tmp_path), 'add_task', config)
  summary = dict(run='bptt-seed0', method='bptt', seed=0, lr=3e-5, test_mse=0.25)
  report.write_report(tmp_path, config, [summary], add_task.PLOT, 'test_mse', digits=4)
  printed = capsys.readouterr().out
  assert '3e-05' in printed
  assert '0.2500' in printed


@pytest.mark.parametrize(
  ('methods', 'rates', 'said'),
  [
    (('bptt', 'fptt'), ({}, {}), True),
    (('bptt', 'fptt'), ({'lr': 0.1}, {'lr': 0.01}), False),
    (('fptt', 'fptt'), ({}, {}), False),
  ],
)
def test_a_report_does_not_rank_methods_at_one_rate(
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
  methods: tuple[str, ...],
  rates: tuple[dict[str, float], ...],
  said: bool,
) -> None:
  config = add_task.Config(method=tuple(set(methods)), lr=0.001, momentum=0.9)
  workdir.open_workdir(str(tmp_path), 'add_task', config)
  summaries = [
    dict(run=f'run{i}', method=method, seed=i, test_mse=0.25, **rate)
    for i, (method, rate) in enumerate(zip(methods, rates, strict=True))
  ]
  report.write_report(tmp_path, config, summaries, add_task.PLOT, 'test_mse', digits=4)
  expected = 'All methods had the learning rate 0.001, so these scores do not say'
  assert (expected in capsys.readouterr().out) == said
