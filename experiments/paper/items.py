"""The paper's figures and tables as declared lists of runs, each at four scales.

'full' has the paper's settings, and those of the authors' release where the paper names
none. 'short' has the paper's model, data and sequence length, but fewer epochs of
images, and the learning rate is annealed to 0 along a half cosine. 'cpu' is a reduced
version for two cores, meant to end within a quarter of an hour. It is another task: its
numbers must not be presented as the paper's. 'smoke' is a test that runs in seconds on
synthetic data.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
from types import ModuleType
from typing import Any, NamedTuple

from experiments import add_task, images, language_model, online
from experiments.core.cells import CELLS, WITH_KERNEL
from experiments.data.memory import PROBLEMS
from experiments.paper import tournament
from experiments.stream import contest

SCALES = ('smoke', 'cpu', 'short', 'full')
"""Values of --scale, from the fastest to the slowest."""


ALPHAS = (1.0, 0.8, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001)
"""Values of α that Sec. 4.2 of the paper compares."""


LEARNING_RATES = {'adam': (3e-3, 1e-3, 3e-4), 'sgd': (2.0, 1.0, 0.5, 0.25)}
"""Learning rates that --tune tries first, by base optimizer."""


RATE_LADDER = {
  'adam': (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
  'sgd': tuple(2.0**power for power in range(-8, 9)),
}
"""Rates that --tune adds to a grid whose best rate is its lowest or highest."""


SHORT_EPOCHS = {'mnist': 30, 'permuted': 30, 'cifar10': 40}
"""Number of epochs of each image task at scale 'short'."""


TRIAL_BATCHES = 1500
"""Batches of each trial of --tune on the adding problem at scale 'short'."""


SHORT_WINDOWS = (10, 28)
"""Numbers of windows K that --tune tries at scale 'short'."""


class Score(NamedTuple):
  """Score that a script measures.

  Attributes:
    test: name of the test score in a run's summary.
    choose: name of the score that settings are chosen by. It is the validation score;
      the adding problem, which draws every batch anew, has the test score of another
      seed.
    curve: name of the score in a run's metrics.
    label: the score in words.
    higher_is_better: whether a higher score is better.
    digits: number of decimals to print.
    axis: the horizontal axis of its curves, 'epoch', 'batches' or 'steps'.
    marks: names and values of horizontal lines beside its curves.
    chance: the score without any learning; None if it is not known.
    chooses_early: whether `choose` is complete before `test` begins, as on a stream. A
      run that diverges after it still has it.
  """

  test: str
  choose: str
  curve: str
  label: str
  higher_is_better: bool
  digits: int
  axis: str = 'epoch'
  marks: tuple[tuple[str, float], ...] = ()
  chance: float | None = None
  chooses_early: bool = False

  def is_chance(self, value: float) -> bool:
    """Return whether a score is about that without any learning, or worse.

    Args:
      value: a value of the score.
    """
    if self.chance is None:
      return False
    # Draws scatter around it by a few percent.
    if self.higher_is_better:
      return value < 1.1 * self.chance
    return value > 0.9 * self.chance


ERROR = Score(
  'test_mse',
  'test_mse',
  'test_mse',
  'test MSE',
  False,
  4,
  'batches',
  (('chance', add_task.CHANCE),),
  add_task.CHANCE,
)


ACCURACY = Score(
  'test_accuracy',
  'valid_accuracy',
  'valid_accuracy',
  'accuracy, %',
  True,
  2,
  # The share of the most frequent digit of MNIST; classes of CIFAR-10 have 10 %.
  chance=11.35,
)


PERPLEXITY = Score('test_ppl', 'valid_ppl', 'valid_ppl', 'perplexity', False, 2)


BITS = Score('test_bpc', 'valid_bpc', 'valid_bpc', 'bits per character', False, 3)


STREAM = Score(
  'test_mae',
  'first_mae',
  'test_mae',
  'mean absolute error',
  False,
  4,
  'steps',
  chooses_early=True,
)


CREDIT = {
  task: Score(
    f'test_{task}',
    f'last_quarter_{task}',
    f'test_{task}',
    f'{task}: {problem.score}',
    False,
    4,
    'batches',
    tuple(problem.levels.items()),
    # Windows alone are little better than knowing neither lag.
    None if task == 'lags' else next(iter(problem.levels.values())),
  )
  for task, problem in PROBLEMS.items()
}
"""Scores of the problems with long dependencies."""


class Entry(NamedTuple):
  """One line of a table: a configuration that is run with every seed.

  Attributes:
    label: name of the line and of its folder, unique within the item.
    script: the module that runs it.
    config: its configuration, of one method; seeds are set later.
    score: the score of the line.
    paper: the paper's number, measured or quoted there; None at reduced scales.
    replication: the number of an independent replication, with its K.
    windows: numbers of windows K that --tune tries; () keeps the configuration's own.
    rates: learning rates that --tune tries first, with all epochs; () for the usual
      ones, with at most three epochs.
    trial_batches: number of batches of a trial of --tune; 0 for all. It is for scripts
      without epochs.
    task: name of the lines that are compared with this one; '' for all of the item.
    can_tune: whether there are data to choose by. Without them --tune leaves the line
      out.
  """

  label: str
  script: ModuleType
  config: Any
  score: Score
  paper: float | None = None
  replication: str = ''
  windows: tuple[int, ...] = ()
  rates: tuple[float, ...] = ()
  trial_batches: int = 0
  task: str = ''
  can_tune: bool = True


CPU_TEXT: dict[str, dict[str, Any]] = {
  'ptb300': dict(
    embedding=64, hidden=64, epochs=6, batch_size=16, train_tokens=100_000
  ),
  'ptb_c': dict(
    embedding=64,
    hidden=128,
    last_hidden=64,
    epochs=2,
    batch_size=32,
    lr=5e-3,
    milestones=(),
    train_tokens=500_000,
  ),
  # Adam and weak dropout instead of the release's SGD and strong dropout, which are for
  # a large model and hundreds of epochs.
  'ptb_w': dict(
    embedding=64,
    hidden=128,
    last_hidden=64,
    experts=2,
    epochs=3,
    min_lr=0.0,
    batch_size=16,
    train_tokens=100_000,
    dynamic_tokens=2000,
    optimizer='adam',
    momentum=0.9,
    lr=5e-3,
    dropout=0.2,
    hidden_dropout=0.1,
    input_dropout=0.2,
    embedding_dropout=0.0,
    latent_dropout=0.1,
    weight_dropout=0.1,
  ),
}
"""Settings of the tasks on text at scale 'cpu'."""


def add(label: str, scale: str, method: str, **settings: Any) -> Entry:
  """Declare a line on the adding problem.

  Args:
    label: name of the line.
    scale: a name in :data:`SCALES`.
    method: training method.
    **settings: further settings of `add_task.Config`.
  """
  reduced: dict[str, dict[str, Any]] = {
    'smoke': dict(hidden=4, batch_size=8, batches=4, eval_every=2, test_size=16),
    'cpu': dict(hidden=64, batch_size=64, batches=1500),
    'short': dict(decay=True, products='bfloat16'),
    'full': {},
  }
  # The script's own defaults are tuned ones, which differ from the paper's.
  paper: dict[str, Any] = dict(
    lr=1e-3, momentum=0.9, decay=False, batches=3000, eval_every=100
  )
  config = add_task.Config(
    **{'method': (method,), **paper, **reduced[scale], **settings}
  )
  trial_batches = TRIAL_BATCHES if scale == 'short' else 0
  return Entry(label, add_task, config, ERROR, trial_batches=trial_batches)


def image(
  label: str,
  scale: str,
  method: str,
  task: str = 'cifar10',
  paper: float | None = None,
  replication: str = '',
  **settings: Any,
) -> Entry:
  """Declare a line on images, pixel by pixel.

  Args:
    label: name of the line.
    scale: a name in :data:`SCALES`.
    method: training method.
    task: 'mnist', 'permuted' or 'cifar10'.
    paper: the paper's number.
    replication: the number of an independent replication.
    **settings: further settings of `images.Config`.
  """
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
  # Products of bfloat16 operands take about half the time on CPUs that have them.
  if settings.get('cell', 'lstm') in WITH_KERNEL:
    reduced['short']['products'] = 'bfloat16'
  if method == 'tbptt_final':
    # Images are read by rows there, so sequences are shorter than the 300 steps of
    # Table 6: truncated after 300, they would be plain BPTT.
    reduced['smoke']['truncation_steps'] = 2
    reduced['cpu']['truncation_steps'] = 10
  config = images.Config(
    **{'method': (method,), 'task': task, **settings, **reduced[scale]}
  )
  # Methods without windows have no K to tune.
  windows = SHORT_WINDOWS if scale == 'short' and method in ('fptt', 'tbptt') else ()
  numbers = quoted(scale, paper, replication)
  return Entry(label, images, config, ACCURACY, *numbers, windows)


def language(
  label: str,
  scale: str,
  method: str,
  task: str,
  paper: float | None = None,
  replication: str = '',
  **settings: Any,
) -> Entry:
  """Declare a line on text.

  Args:
    label: name of the line.
    scale: a name in :data:`SCALES`.
    method: training method.
    task: 'ptb300', 'ptb_c' or 'ptb_w'.
    paper: the paper's number.
    replication: the number of an independent replication.
    **settings: further settings of `language_model.Config`.
  """
  reduced: dict[str, dict[str, Any]] = {
    'smoke': _smoke_text(task),
    'cpu': CPU_TEXT[task],
    # PTB-300 ends by itself when its plateaus have brought the rate down.
    'short': {},
    'full': {},
  }
  preset = language_model.TASKS.get(task, {})
  config = language_model.Config(
    **{'method': (method,), 'task': task, **preset, **settings, **reduced[scale]}
  )
  score = BITS if task == 'ptb_c' else PERPLEXITY
  return Entry(label, language_model, config, score, *quoted(scale, paper, replication))


def _smoke_text(task: str) -> dict[str, Any]:
  """Return the settings of a task on text at scale 'smoke'."""
  settings: dict[str, Any] = dict(
    task='text_c' if task == 'ptb_c' else 'text',
    data_dir='.',
    embedding=8,
    hidden=8,
    epochs=1,
    batch_size=4,
    seq_len=12,
    num_windows=3,
  )
  # The models of Table 5 have three layers, the last one of another size.
  return settings if task == 'ptb300' else settings | dict(last_hidden=8)


def quoted(
  scale: str, paper: float | None, replication: str
) -> tuple[float | None, str]:
  """Return the numbers from other work that a line at this scale can be compared with.

  Args:
    scale: a name in :data:`SCALES`.
    paper: the paper's number.
    replication: the number of an independent replication.

  Returns:
    The two numbers at scales with the paper's model, data and length; else (None, '').
  """
  return (paper, replication) if scale in ('short', 'full') else (None, '')


def fig1(scale: str) -> list[Entry]:
  """Declare Fig. 1: the adding problem at T = 500."""
  return rivals(scale, {'smoke': 12, 'cpu': 150, 'short': 500, 'full': 500}[scale])


def rivals(scale: str, seq_len: int) -> list[Entry]:
  """Declare the methods that Figs. 1 and 3 compare on the adding problem.

  These are FPTT at two values of α, the same windows without the regularizer (the
  control that the paper does not have), and BPTT.

  Args:
    scale: a name in :data:`SCALES`.
    seq_len: sequence length T.
  """
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
  """Declare Fig. 2: the adding problem at T = 200 by the number of windows K."""
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
    # One window of the whole sequence, without the regularizer, is BPTT.
    if num_windows == 1:
      entries.append(add('bptt', scale, 'bptt', seq_len=seq_len))
    else:
      entries.append(add(f'tbptt-K{num_windows}', scale, 'tbptt', **settings))
    entries += [
      add(f'fptt-K{num_windows}-alpha{alpha}', scale, 'fptt', alpha=alpha, **settings)
      for alpha in (0.5, 0.1)
    ]
  return entries


def fig3(scale: str) -> list[Entry]:
  """Declare Fig. 3: the adding problem at T = 750 and 1000."""
  lengths = {
    'smoke': (12, 16),
    'cpu': (200, 250),
    'short': (750, 1000),
    'full': (750, 1000),
  }[scale]
  return [entry for seq_len in lengths for entry in rivals(scale, seq_len)]


def table2(scale: str) -> list[Entry]:
  """Declare Table 2: pixel CIFAR-10 by cell."""
  paper = {
    'lstm': (60.11, 71.03),
    'gru': (66.28, 71.37),
    'antisymmetric': (62.41, 72.13),
  }
  entries = []
  for cell, (bptt, fptt) in paper.items():
    settings: dict[str, Any] = {'cell': cell}
    # The paper gives this cell twice the width of the others.
    if cell == 'antisymmetric':
      settings['hidden'] = 256
    entries += [
      image(f'{cell}-bptt', scale, 'bptt', paper=bptt, **settings),
      image(f'{cell}-tbptt', scale, 'tbptt', **settings),
      image(f'{cell}-fptt', scale, 'fptt', paper=fptt, **settings),
    ]
  return entries


def table3(scale: str) -> list[Entry]:
  """Declare Table 3: pixel CIFAR-10 by BPTT with auxiliary losses."""
  return [
    image('bptt', scale, 'bptt', paper=60.11),
    image('bptt-aux', scale, 'bptt_aux', paper=65.65),
    image('bptt-reconstruction', scale, 'bptt', reconstruction=1.0),
    image('tbptt', scale, 'tbptt'),
    image('fptt', scale, 'fptt', paper=71.03),
  ]


def table4(scale: str) -> list[Entry]:
  """Declare Table 4: PTB-300.

  The paper quotes FastGRNN and IncrementalRNN. FastGRNN is run here with the LSTM's
  settings.
  """
  # The states of IncrementalRNN, carried through a whole text, grew without bound by
  # SGD at any rate tried.
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
  """Declare Table 5: PTB-c and PTB-w.

  The paper's perplexities are with dynamic evaluation. The summaries hold the
  perplexities with and without it.
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
  """Declare Table 6: pixel MNIST, permuted MNIST and pixel CIFAR-10.

  The other systems that the paper quotes are run by BPTT.
  """
  # By task, the paper's accuracies of BPTT, of BPTT truncated after 300 steps, and of
  # FPTT.
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
    # Momentum carries gradients from window to window; this line shows the windows
    # without it.
    if scale == 'short':
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
  """Declare runs of every cell on pixel MNIST."""
  return [
    image(f'{cell}-{method}', scale, method, 'mnist', cell=cell)
    for cell in CELLS
    for method in ('bptt', 'tbptt', 'fptt')
  ]


def alpha(scale: str) -> list[Entry]:
  """Declare the comparison of values of α on PTB-300."""
  chosen = ALPHAS if scale in ('short', 'full') else (1.0, 0.5, 0.1, 0.01)
  return [
    language('tbptt', scale, 'tbptt', 'ptb300'),
    *(
      language(f'fptt-alpha{value}', scale, 'fptt', 'ptb300', alpha=value)
      for value in chosen
    ),
  ]


PRODUCTS = ('float32', 'bfloat16')
"""Values of --products that the item 'products' compares."""


def products(scale: str) -> list[Entry]:
  """Declare training with the products of layers in float32 and in bfloat16.

  The paper has no such comparison. Pixel MNIST has the paper's model and one epoch,
  PTB-300 is that of scale 'cpu'. The adding problem has the paper's model at T = 200
  and 1,000 batches, by the windows and by BPTT; its rate is annealed to 0. 'full' and
  'short' are the same as 'cpu'.

  Args:
    scale: a name in :data:`SCALES`.
  """
  size = 'smoke' if scale == 'smoke' else 'cpu'
  mnist = image('mnist', size, 'tbptt', 'mnist', momentum=0.0, decay=True)
  pixels = dict(row=False, hidden=128, epochs=1, milestones=(), num_windows=28, lr=3e-3)
  if scale != 'smoke':
    mnist = mnist._replace(config=dataclasses.replace(mnist.config, **pixels))
  words = language('ptb300', size, 'fptt', 'ptb300')
  paper: dict[str, Any] = dict(seq_len=200, hidden=128, batch_size=128, batches=1000)
  adding: dict[str, Any] = dict(lr=1e-2, decay=True)
  adding |= dict(seq_len=20) if scale == 'smoke' else paper
  return [
    entry._replace(
      label=f'{entry.label}-{entry.config.method[0]}-{name}',
      config=dataclasses.replace(entry.config, products=name),
    )
    for entry in (
      mnist,
      words,
      add('adding', size, 'tbptt', num_windows=10, **adding),
      add('adding', size, 'bptt', **adding),
    )
    for name in PRODUCTS
  ]


LONG_RECALL = dict(seq_len=10_000, num_windows=1000, batches=200, test_steps=200)
"""Settings of the recall of a number that was shown 10,000 steps before."""


PUBLISHED_ERRORS = {
  'henon': {
    'rtrl': 0.0052,
    'snap1': 0.0052,
    'kf': 0.0384,
    'rflo': 0.0704,
    'uoro': 0.6583,
    'lookback25': 0.0311,
  },
  'mackey_glass': {
    'rtrl': 0.0180,
    'snap1': 0.0050,
    'kf': 0.0286,
    'rflo': 0.0572,
    'uoro': 0.0497,
    'lookback25': 0.0080,
  },
  'lorenz': {
    'rtrl': 0.0051,
    'snap1': 0.0024,
    'kf': 0.0126,
    'rflo': 0.0442,
    'uoro': 0.0425,
    'lookback25': 0.0054,
  },
}
"""Normalized errors of another implementation, by task and influence.

These are from Table 6 of the report on sketched RTRL (SK-RTRL, 2026): means over 10
seeds (5 for truncated BPTT) of an RNN of the same size, with the same batch, rate and
number of steps. The series are drawn by other code.
"""


def credit(scale: str) -> list[Entry]:
  """Declare the problems that windows alone cannot learn, with and without credit.

  The paper has no such comparison. 'full' and 'short' are the same as 'cpu'.
  """
  variants = (
    ('tbptt', 'none'),
    ('tbptt', 'snap1'),
    ('tbptt', 'rtrl'),
    ('fptt', 'none'),
    ('fptt', 'rtrl'),
    ('bptt', 'none'),
  )
  more = {
    'lags': ('lookback', 'uoro', 'kronecker'),
    'recall': (),
  }
  entries = []
  for task in online.TASKS:
    if task == 'sunspots' and scale == 'smoke':
      continue  # Its numbers come with a package that tests need not install.
    others = more.get(task, ('lookback25', 'rflo', 'uoro', 'kf', 'kronecker'))
    for method, influence in (*variants, *(('tbptt', name) for name in others)):
      entry = _online(task, scale, task, method, influence)
      published = PUBLISHED_ERRORS.get(task, {}).get(influence)
      if published is not None and method == 'tbptt' and scale != 'smoke':
        entry = entry._replace(replication=f'{published}')
      entries.append(entry)
  if scale == 'smoke':
    return entries
  return entries + [
    _online('recall10000', scale, 'recall', method, influence, **LONG_RECALL)
    for method, influence in (('tbptt', 'none'), ('tbptt', 'rtrl'), ('bptt', 'none'))
  ]


def _online(
  name: str, scale: str, task: str, method: str, influence: str, **settings: Any
) -> Entry:
  """Declare a line on a problem with a long dependency.

  Args:
    name: name of the problem in the line's label.
    scale: a name in :data:`SCALES`.
    task: a name in `online.TASKS`.
    method: training method.
    influence: how credit crosses the border of a window.
    **settings: further settings of `online.Config`.
  """
  preset = online.TASKS[task] | settings
  if scale == 'smoke':
    preset |= dict(seq_len=12, num_windows=3, hidden=4, batch_size=4, batches=4)
    preset |= dict(eval_every=2, test_steps=20)
  if method == 'bptt':
    del preset['num_windows']
  config = online.Config(task=task, method=(method,), influence=influence, **preset)
  label = f'{name}-{method}' + ('' if influence == 'none' else f'-{influence}')
  # Where the test data are the same for all seeds, a trial would be scored on them.
  can_tune = PROBLEMS[task].draw_test is None
  return Entry(label, online, config, CREDIT[task], can_tune=can_tune)


TOURNAMENT_SCRIPTS: dict[str, ModuleType] = {
  'add_task': add_task,
  'images': images,
  'language_model': language_model,
  'online': online,
  'stream': contest,
}
"""Scripts of the tournament by name."""


TOURNAMENT_SCORES = {
  'add_task': ERROR,
  'images': ACCURACY,
  'language_model': PERPLEXITY,
  'online': CREDIT['recall'],
  'stream': STREAM,
}
"""Scores of these scripts, except for characters."""


def tournament_of(scale: str) -> list[Entry]:
  """Declare the tournament of training methods, see `experiments.paper.tournament`.

  The paper has no such comparison.
  """
  entries = []
  for arena in tournament.ARENAS:
    # A stream has one size, and its numbers come with a package that tests lack.
    if arena.script == 'stream' and scale != 'cpu':
      continue
    script = TOURNAMENT_SCRIPTS[arena.script]
    for contestant in tournament.contestants(arena):
      settings = tournament.settings_of(arena, contestant, scale)
      config = script.Config(**settings)
      score = BITS if arena.name == 'ptb_c' else TOURNAMENT_SCORES[arena.script]
      label = f'{arena.name}.{contestant.name}'
      rates = tournament.RATES[arena.optimizer]
      entries.append(Entry(label, script, config, score, rates=rates, task=arena.name))
  return entries


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
  'online': credit,
  'tournament': tournament_of,
  'products': products,
}
"""Items that are compared by training: (scale) -> lines."""


def first_rates(entry: Entry) -> tuple[float, ...]:
  """Return the learning rates that tuning tries first, the highest first."""
  if entry.rates:
    return entry.rates
  rates = LEARNING_RATES[entry.config.optimizer]
  # The declared rate must be among those tried, or tuning could make a line worse.
  if entry.config.lr not in rates:
    rates = tuple(entry.config.lr * factor for factor in (1.0, 0.5, 0.25))
  return rates


def next_rate(entry: Entry, rates: Collection[float], best: float) -> float | None:
  """Return the rate that tuning tries next.

  Args:
    entry: the line.
    rates: the rates tried so far.
    best: the best of them.

  Returns:
    The next rate beyond `best` if that is the lowest or highest of `rates`; None if it
    lies inside or the ladder ends.
  """
  ladder = RATE_LADDER[entry.config.optimizer]
  # The margin skips the ladder's own copy of the best rate, however it is rounded.
  if best == max(rates):
    return min((rate for rate in ladder if rate > 1.1 * best), default=None)
  if best == min(rates):
    return max((rate for rate in ladder if rate < best / 1.1), default=None)
  return None


def edge_of(rates: Collection[float], chosen: float) -> str:
  """Return at which end of the rates that were tried a chosen one is.

  Args:
    rates: the rates tried.
    chosen: the rate with the best score.

  Returns:
    'highest' or 'lowest', where a rate beyond may be better still; '' if it is inside.
  """
  if chosen >= max(rates):
    return 'highest'
  return 'lowest' if chosen <= min(rates) else ''


def describe_choice(
  score: Score, trials: Mapping[float, float | None], chosen: float
) -> str:
  """Say in a table's cell that a rate was tuned, and where in its grid it lies.

  Args:
    score: what the trials are scored by.
    trials: the score of each rate that was tried, None if the run diverged; empty if
      the rates are not known.
    chosen: the rate with the best score.
  """
  if not trials:
    return 'yes, rates not recorded'
  finite = [value for value in trials.values() if value is not None]
  if finite and all(score.is_chance(value) for value in finite):
    return 'yes, all at chance'
  edge = edge_of(trials, chosen)
  return f'yes, the {edge} tried' if edge else 'yes'


def grid(entry: Entry, rates: Collection[float], num_windows: int | None = None) -> Any:
  """Return the configuration that tuning runs for a line.

  It trains three epochs at each rate, or the line's `trial_batches`, and does not look
  at the test split.

  Args:
    entry: the line.
    rates: learning rates.
    num_windows: K; None keeps the line's own.
  """
  changes: dict[str, Any] = {'grid': ('lr=' + ':'.join(f'{rate:g}' for rate in rates),)}
  if hasattr(entry.config, 'epochs'):
    if not entry.rates:
      changes['epochs'] = min(3, entry.config.epochs)
    changes['evaluate_test'] = False
  # Not fewer than half: the loss of the adding problem falls only late in a run.
  if entry.trial_batches:
    changes['batches'] = min(entry.trial_batches, entry.config.batches)
  if num_windows is not None:
    changes['num_windows'] = num_windows
  return dataclasses.replace(entry.config, **changes)
