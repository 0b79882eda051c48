"""The paper's figures and tables as declared lists of runs, each at three scales.

'full' is the paper's setting where it says one and the authors' release's where it does
not. 'short' keeps the paper's model, data and sequence length, but anneals the learning
rate to 0 along a half cosine in fewer epochs. 'cpu' is a reduced version for two
cores, meant to end within a quarter of an hour: another task, never to be shown as the
paper's. 'smoke' runs in seconds, on made-up data, and means nothing.
"""

from collections.abc import Callable, Collection
import dataclasses
from types import ModuleType
from typing import Any, NamedTuple

from experiments import add_task, images, language_model
from experiments.core.cells import CELLS

SCALES = ('smoke', 'cpu', 'short', 'full')


ALPHAS = (1.0, 0.8, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001)
"""Sec. 4.2."""


LEARNING_RATES = {'adam': (3e-3, 1e-3, 3e-4), 'sgd': (2.0, 1.0, 0.5, 0.25)}
"""Learning rates that --tune tries first, by base optimizer."""


RATE_LADDER = {
  'adam': (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
  'sgd': tuple(2.0**power for power in range(-8, 7)),
}
"""Rates by which --tune extends a grid whose best rate is its lowest or highest."""


SHORT_EPOCHS = {'mnist': 30, 'permuted': 30, 'cifar10': 40}
"""Epochs at scale 'short'."""


SHORT_WINDOWS = (10, 28)
"""Numbers of windows K that --tune tries at scale 'short'."""


class Score(NamedTuple):
  """What a script measures.

  Attributes:
    test: its name in a run's summary.
    choose: name of the score that settings are chosen by: of validation, or of the test
      draws of another seed where every batch is drawn afresh.
    curve: its name in a run's metrics.
    label: in words.
    higher_is_better: which way is up.
    digits: decimals worth printing.
  """

  test: str
  choose: str
  curve: str
  label: str
  higher_is_better: bool
  digits: int


ERROR = Score('test_mse', 'test_mse', 'test_mse', 'test MSE', False, 4)


ACCURACY = Score(
  'test_accuracy', 'valid_accuracy', 'valid_accuracy', 'accuracy, %', True, 2
)


PERPLEXITY = Score('test_ppl', 'valid_ppl', 'valid_ppl', 'perplexity', False, 2)


BITS = Score('test_bpc', 'valid_bpc', 'valid_bpc', 'bits per character', False, 3)


class Entry(NamedTuple):
  """One line of a table: a configuration, run from every seed.

  Attributes:
    label: unique within the item; its folder's name.
    script: the module that runs it.
    config: its configuration, of one method; seeds are set later.
    score: what is measured.
    paper: the paper's number, measured or quoted there, at the scales 'full' and
      'short' only.
    replication: that of an independent replication (see the README), at the K it names.
    windows: numbers of windows K that --tune tries; () keeps the configuration's own.
  """

  label: str
  script: ModuleType
  config: Any
  score: Score
  paper: float | None = None
  replication: str = ''
  windows: tuple[int, ...] = ()


def add(label: str, scale: str, method: str, **settings: Any) -> Entry:
  """An adding-problem entry."""
  reduced = {
    'smoke': dict(hidden=4, batch_size=8, batches=4, eval_every=2, test_size=16),
    'cpu': dict(hidden=64, batch_size=64, batches=1500),
    'short': dict(decay=True),
    'full': {},
  }
  paper = dict(lr=1e-3, momentum=0.9, decay=False, batches=3000, eval_every=100)
  config = add_task.Config(**{'method': (method,)} | paper | reduced[scale] | settings)
  return Entry(label, add_task, config, ERROR)


def image(
  label: str,
  scale: str,
  method: str,
  task: str = 'cifar10',
  paper: float | None = None,
  replication: str = '',
  **settings: Any,
) -> Entry:
  """An image entry."""
  reduced: dict[str, dict[str, Any]] = {
    'smoke': dict(
      task='arrays',
      data_dir='.npz',
      row=True,
      hidden=8,
      batch_size=8,
      valid_size=8,
      epochs=1,
      num_windows=2,
    ),
    'cpu': dict(row=True, hidden=64, epochs=5, milestones=(4,), num_windows=None),
    'short': dict(epochs=SHORT_EPOCHS[task], milestones=(), decay=True),
    'full': {},
  }
  if method == 'tbptt_final' and scale in (
    'smoke',
    'cpu',
  ):  # The 300 of 784 steps of Table 6 in proportion: all of them would be BPTT.
    reduced[scale] |= dict(truncation_steps={'smoke': 2, 'cpu': 10}[scale])
  config = images.Config(
    **{'method': (method,), 'task': task} | settings | reduced[scale]
  )
  windows = SHORT_WINDOWS if scale == 'short' and method in ('fptt', 'tbptt') else ()
  return Entry(
    label, images, config, ACCURACY, *quoted(scale, paper, replication), windows
  )


def language(
  label: str,
  scale: str,
  method: str,
  task: str,
  paper: float | None = None,
  replication: str = '',
  **settings: Any,
) -> Entry:
  """A language entry."""
  characters = task == 'ptb_c'
  small = dict(data_dir='.', embedding=8, hidden=8, epochs=1, batch_size=4, seq_len=12)
  reduced: dict[str, dict[str, Any]] = {
    'smoke': small | dict(task='text_c' if characters else 'text', num_windows=3),
    'cpu': {
      'ptb300': dict(
        embedding=64, hidden=64, epochs=6, batch_size=16, train_tokens=100_000
      ),
      'ptb_c': dict(
        embedding=64,
        hidden=128,
        epochs=2,
        batch_size=32,
        lr=5e-3,
        milestones=(),
        train_tokens=500_000,
      ),
      'ptb_w': dict(
        embedding=64,
        hidden=128,
        experts=2,
        epochs=3,
        batch_size=16,
        train_tokens=100_000,
        dynamic_tokens=2000,
      )
      | dict(
        optimizer='adam',
        momentum=0.9,
        lr=5e-3,
        dropout=0.2,
        hidden_dropout=0.1,
        input_dropout=0.2,
        embedding_dropout=0.0,
      )
      | dict(latent_dropout=0.1, weight_dropout=0.1),
    }[task],
    # PTB-300 ends by itself, when its plateaus have brought the rate down.
    'short': {},
    'full': {},
  }
  deep = task != 'ptb300'
  if deep:
    reduced['smoke'] |= dict(last_hidden=8)
    reduced['cpu'] |= dict(last_hidden=64)
  preset = language_model.TASKS.get(task, {})
  config = language_model.Config(
    **{'method': (method,), 'task': task} | preset | settings | reduced[scale]
  )
  return Entry(
    label,
    language_model,
    config,
    BITS if characters else PERPLEXITY,
    *quoted(scale, paper, replication),
  )


def quoted(
  scale: str, paper: float | None, replication: str
) -> tuple[float | None, str]:
  """Returns the numbers from elsewhere; they stand beside runs of the paper's model,
  data and length only.
  """
  return (paper, replication) if scale in ('short', 'full') else (None, '')


def fig1(scale: str) -> list[Entry]:
  """Adding problem, T=500."""
  return rivals(scale, {'smoke': 12, 'cpu': 150, 'short': 500, 'full': 500}[scale])


def rivals(scale: str, seq_len: int) -> list[Entry]:
  """FPTT at two alphas, the same windows without the regularizer, and BPTT."""
  settings = dict(seq_len=seq_len, num_windows={'smoke': 3}.get(scale, 10))
  return [
    *(
      add(f'T{seq_len}-fptt-alpha{alpha}', scale, 'fptt', alpha=alpha, **settings)
      for alpha in (0.5, 0.1)
    ),
    add(f'T{seq_len}-tbptt', scale, 'tbptt', **settings),
    add(f'T{seq_len}-bptt', scale, 'bptt', seq_len=seq_len),
  ]


def fig2(scale: str) -> list[Entry]:
  """Adding problem, T=200, by K."""
  paper = (200, (1, 3, 5, 10, 100, 200))
  seq_len, windows = {
    'smoke': (12, (1, 3, 12)),
    'cpu': (100, (1, 5, 10, 100)),
    'short': paper,
    'full': paper,
  }[scale]
  entries = []
  for num_windows in windows:
    settings = dict(seq_len=seq_len, num_windows=num_windows)
    if num_windows == 1:  # One window of the whole sequence, without the regularizer.
      entries.append(add('bptt', scale, 'bptt', seq_len=seq_len))
    else:
      entries.append(add(f'tbptt-K{num_windows}', scale, 'tbptt', **settings))
    entries += [
      add(f'fptt-K{num_windows}-alpha{alpha}', scale, 'fptt', alpha=alpha, **settings)
      for alpha in (0.5, 0.1)
    ]
  return entries


def fig3(scale: str) -> list[Entry]:
  """Adding problem, T=750 and 1000."""
  lengths = {
    'smoke': (12, 16),
    'cpu': (200, 250),
    'short': (750, 1000),
    'full': (750, 1000),
  }[scale]
  return [entry for seq_len in lengths for entry in rivals(scale, seq_len)]


def table2(scale: str) -> list[Entry]:
  """Pixel CIFAR-10 by cell."""
  paper = {
    'lstm': (60.11, 71.03),
    'gru': (66.28, 71.37),
    'antisymmetric': (62.41, 72.13),
  }
  entries = []
  for cell, (bptt, fptt) in paper.items():
    settings: dict[str, Any] = dict(cell=cell) | (
      dict(hidden=256) if cell == 'antisymmetric' else {}
    )
    entries += [
      image(f'{cell}-bptt', scale, 'bptt', paper=bptt, **settings),
      image(f'{cell}-tbptt', scale, 'tbptt', **settings),
      image(f'{cell}-fptt', scale, 'fptt', paper=fptt, **settings),
    ]
  return entries


def table3(scale: str) -> list[Entry]:
  """Pixel CIFAR-10: auxiliary losses for BPTT."""
  return [
    image('bptt', scale, 'bptt', paper=60.11),
    image('bptt-aux', scale, 'bptt_aux', paper=65.65),
    image('bptt-reconstruction', scale, 'bptt', reconstruction=1.0),
    image('tbptt', scale, 'tbptt'),
    image('fptt', scale, 'fptt', paper=71.03),
  ]


def table4(scale: str) -> list[Entry]:
  """PTB-300; FastGRNN, which the paper quotes, at the LSTM's settings; IncrementalRNN,
  quoted too, by Adam: its states, carried on through a whole text, grew without bound
  by SGD at any rate tried.
  """
  adam: dict[str, Any] = dict(cell='irnn', optimizer='adam', lr=3e-3, min_lr=0.0)
  return [
    language('bptt', scale, 'bptt', 'ptb300', paper=117.09, replication='164.6 (K=1)'),
    language('tbptt', scale, 'tbptt', 'ptb300', replication='121.2 (K=5)'),
    language(
      'fptt-kappa2', scale, 'fptt', 'ptb300', paper=106.27, replication='109.5 (K=5)'
    ),
    language('fptt-kappa1', scale, 'fptt', 'ptb300', kappa=1.0),
    language('fastgrnn-bptt', scale, 'bptt', 'ptb300', paper=116.11, cell='fastgrnn'),
    language('fastgrnn-tbptt', scale, 'tbptt', 'ptb300', cell='fastgrnn'),
    language('fastgrnn-fptt', scale, 'fptt', 'ptb300', cell='fastgrnn'),
    language('irnn-bptt', scale, 'bptt', 'ptb300', paper=115.71, **adam),
    language('irnn-tbptt', scale, 'tbptt', 'ptb300', **adam),
    language('irnn-fptt', scale, 'fptt', 'ptb300', **adam),
  ]


def table5(scale: str) -> list[Entry]:
  """PTB-c and PTB-w. The paper's perplexities are with dynamic evaluation; the
  summaries hold both.
  """
  return [
    language(
      'ptb_c-bptt', scale, 'bptt', 'ptb_c', paper=1.183, replication='1.257 (K=1)'
    ),
    language('ptb_c-tbptt', scale, 'tbptt', 'ptb_c', replication='1.280 (K=3)'),
    language(
      'ptb_c-fptt', scale, 'fptt', 'ptb_c', paper=1.165, replication='1.273 (K=3)'
    ),
    language(
      'ptb_w-bptt', scale, 'bptt', 'ptb_w', paper=51.9, replication='75.2 (K=1, static)'
    ),
    language('ptb_w-tbptt', scale, 'tbptt', 'ptb_w', replication='73.8 (K=5, static)'),
    language(
      'ptb_w-fptt',
      scale,
      'fptt',
      'ptb_w',
      paper=50.96,
      replication='74.4 (K=5, static)',
    ),
  ]


def table6(scale: str) -> list[Entry]:
  """Pixel MNIST, permuted MNIST, pixel CIFAR-10; other systems by BPTT, as the paper
  quotes them.
  """
  paper = {
    'mnist': (97.71, 11.3, 98.67),
    'permuted': (88.91, 88.8, 94.75),
    'cifar10': (60.11, 49.01, 71.03),
  }
  replication = {
    'mnist': ('11.3 (K=1)', '97.2 (K=7)', '97.4 (K=7)'),
    'permuted': ('88.7 (K=1)', '93.4 (K=7)', '94.0 (K=7)'),
    'cifar10': ('56.3 (K=1)', '66.8 (K=8)', '65.4 (K=8)'),
  }
  entries = []
  for task, (bptt, truncated, fptt) in paper.items():
    without, windows, regularized = replication[task]
    entries += [
      image(f'{task}-bptt', scale, 'bptt', task, bptt, without),
      image(f'{task}-tbptt_final', scale, 'tbptt_final', task, truncated),
      image(f'{task}-tbptt', scale, 'tbptt', task, replication=windows),
      image(f'{task}-fptt', scale, 'fptt', task, fptt, regularized),
    ]
    if scale == 'short':  # WindowPlan without momentum within a sequence.
      entries.append(
        image(f'{task}-tbptt-momentum0', scale, 'tbptt', task, momentum=0.0)
      )
  others: list[tuple[str, dict[str, Any], dict[str, float]]] = [
    ('antisymmetric', dict(cell='antisymmetric'), {'mnist': 98.8, 'permuted': 93.1}),
    ('antisymmetric', dict(cell='antisymmetric', hidden=256), {'cifar10': 62.20}),
    ('irnn', dict(cell='irnn'), {'mnist': 98.13, 'permuted': 95.62}),
    ('indrnn6', dict(cell='indrnn', layers=6), {'mnist': 99.0, 'permuted': 96.0}),
    (
      'r_lstm',
      dict(reconstruction=1.0),
      {'mnist': 98.4, 'permuted': 95.2, 'cifar10': 72.20},
    ),
  ]
  for system, settings, numbers in others:
    entries += [
      image(f'{task}-{system}-bptt', scale, 'bptt', task, number, **settings)
      for task, number in numbers.items()
    ]
  return entries


def cells(scale: str) -> list[Entry]:
  """Pixel MNIST by every cell, by BPTT and FPTT."""
  return [
    image(f'{cell}-{method}', scale, method, 'mnist', cell=cell)
    for cell in CELLS
    for method in ('bptt', 'tbptt', 'fptt')
  ]


def alpha(scale: str) -> list[Entry]:
  """PTB-300 by alpha."""
  chosen = ALPHAS if scale in ('short', 'full') else (1.0, 0.5, 0.1, 0.01)
  return [
    language('tbptt', scale, 'tbptt', 'ptb300'),
    *(
      language(f'fptt-alpha{value}', scale, 'fptt', 'ptb300', alpha=value)
      for value in chosen
    ),
  ]


ITEMS: dict[str, Callable[[str], list[Entry]]] = {
  'fig1': fig1,
  'fig2': fig2,
  'fig3': fig3,
  'table2': table2,
  'table3': table3,
  'table4': table4,
  'table5': table5,
  'table6': table6,
  'cells': cells,
  'alpha': alpha,
}
"""What is compared by training."""


def first_rates(entry: Entry) -> tuple[float, ...]:
  """Returns the learning rates that tuning tries first, the highest first."""
  rates = LEARNING_RATES[entry.config.optimizer]
  if entry.config.lr not in rates:
    rates = tuple(entry.config.lr * factor for factor in (1.0, 0.5, 0.25))
  return rates


def next_rate(entry: Entry, rates: Collection[float], best: float) -> float | None:
  """Returns the rate to try next when the best of `rates` is their lowest or highest,
  None when it lies inside.
  """
  ladder = RATE_LADDER[entry.config.optimizer]
  if best == max(rates):
    return min((rate for rate in ladder if rate > 1.1 * best), default=None)
  if best == min(rates):
    return max((rate for rate in ladder if rate < best / 1.1), default=None)
  return None


def grid(entry: Entry, rates: Collection[float], num_windows: int | None = None) -> Any:
  """Returns the configuration that tuning runs for an entry: three epochs at each rate,
  the test split left alone.

  The adding problem, where nothing shows before most of a run is over, runs all its
  batches.
  """
  shorter = (
    dict(epochs=min(3, entry.config.epochs), evaluate_test=False)
    if hasattr(entry.config, 'epochs')
    else {}
  )
  windows = {} if num_windows is None else dict(num_windows=num_windows)
  return dataclasses.replace(
    entry.config,
    grid=('lr=' + ':'.join(f'{rate:g}' for rate in rates),),
    **windows,
    **shorter,
  )
