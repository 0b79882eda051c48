"""The tournament of training methods: its tasks, methods and protocol.

The protocol was fixed before the first run:

* Every line (a method on a task) has the same trials: :data:`RATES` of its base
  optimizer, on the draws of the seed of all tuning. If the best rate is the lowest or
  the highest, the next one on the ladder is tried until the best lies inside, with at
  most eight in all. The momentum, the strength of the regularizer and the horizon of
  averages are part of a method and not tuned.
* The rate is chosen by the score on draws of its own: the validation split where there
  is one, else the test score of the tuning seed (of the recall its mean over the last
  quarter of the batches). The reported runs have five other seeds, 0 to 4. A seed means
  the same first weights and the same batches for all methods of a task.
* The one number that is compared is the test score after the declared number of
  batches: of the last weights on the adding problem and the recall, and of the epoch
  with the best validation score on images and text. Averages are methods of their own.
* Each method is compared with `tbptt` and with `bptt` by a paired t-test, two-sided, on
  the logarithm of the loss, perplexity or share of errors. Losses below 1e-6 count as
  1e-6, a solved problem (set after the tuning of the recall, before its reported runs).
  Holm's correction covers the methods of a task, for each of the two rivals by itself.
  A method beats both if it has the better mean and p < 0.05 against both.
* `tbptt` is Adam with b1 = 0.9 and windows; on PTB-300 SGD with momentum 0.9. The rate
  falls to 0 along a half cosine, except for averages and the schedule-free optimizer,
  which are meant for a constant one.

Two parts were added after the first tasks had been run, before their own first runs:

* `bootstrap` gives early windows their own targets, see `experiments.core.bootstrap`.
  The share of the prediction grows linearly from 0 to 0.9 over the run, and the weights
  that are scored are the last ones, as of `tbptt`. It is for tasks with one target per
  sequence. On the recall only the last window has the target; `bootstrap` gives it to
  all windows there, with weight k/K at the k-th of K, and `early` does that alone.
* Streams are seen once and scored on the fly: each forecast comes before its value. The
  error over the first 30 % of the scored steps chooses the rate, and that over the rest
  is reported. The rate is constant, since a stream has no end. With averages it is they
  that forecast; the mean of the weights is over 50 days. The network is the GRU of
  `python -m experiments.stream`. A stream has no whole that `bptt` could differentiate
  and its windows have no numbers, so that neither it nor `by_window` takes part, and
  `tbptt` is the only rival there.

Scale 'cpu' is for two cores and 'short' is one size above, without the streams, which
have one size. 'full' equals 'short'.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

RATES = {
  'adam': (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
  'sgd': (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
}
"""Learning rates that every line tries, by base optimizer."""


HORIZON = 50
"""Sequences that a running mean of the weights is over."""


COUPLED = dict(coupling='update', alpha=0.3, kappa=1.0)
"""The regularizer decoupled from the preconditioner."""


class Contestant(NamedTuple):
  """A training method.

  Attributes:
    name: its name in the lines' labels.
    method: the method of the trainer.
    settings: further settings.
  """

  name: str
  method: str
  settings: dict[str, Any]


class Arena(NamedTuple):
  """A task with all that is common to its lines.

  Attributes:
    name: its name in the lines' labels.
    script: 'add_task', 'images', 'language_model', 'online' or 'stream'.
    optimizer: the base optimizer.
    alpha: α as published for this kind of task.
    windows: K at all scales but 'smoke'; of a stream, windows per day.
    settings: settings at scale 'cpu'.
    larger: what scale 'short' changes.
    extra: names of :data:`EXTRAS` that the task has besides the common methods.
    influence: an influence that all common methods are also run with; '' for none.
  """

  name: str
  script: str
  optimizer: str
  alpha: float
  windows: int
  settings: dict[str, Any]
  larger: dict[str, Any]
  extra: tuple[str, ...] = ()
  influence: str = ''


ADDING: dict[str, Any] = dict(
  seq_len=200, hidden=32, batch_size=32, batches=1000, eval_every=100, test_size=512
)
"""The adding problem at scale 'cpu'."""


PIXELS: dict[str, Any] = dict(
  hidden=32,
  batch_size=100,
  train_size=10_000,
  valid_size=2000,
  epochs=5,
  milestones=(),
  divergence='none',
)
"""Images at scale 'cpu'."""


TEXT: dict[str, Any] = dict(
  embedding=64,
  hidden=64,
  batch_size=16,
  epochs=4,
  plateau_factor=1.0,
  min_lr=0.0,
)
"""Text at scale 'cpu'."""


ARENAS = (
  Arena(
    'recall',
    'online',
    'adam',
    0.5,
    10,
    dict(task='recall', cell='lru', hidden=4, seq_len=100, batch_size=16, batches=300),
    dict(seq_len=1000, batches=500),
    ('snap1', 'lookback', 'early', 'bootstrap'),
    influence='rtrl',
  ),
  *(
    Arena(
      f'adding-K{windows}',
      'add_task',
      'adam',
      0.5,
      windows,
      ADDING,
      dict(hidden=64, batch_size=64, batches=2000),
      ('immediate', 'lookback', 'bootstrap') if windows == 10 else ('bootstrap',),
    )
    for windows in (3, 10, 50)
  ),
  Arena(
    'permuted-rows',
    'images',
    'adam',
    0.1,
    7,
    PIXELS | dict(task='permuted', row=True),
    dict(hidden=64, train_size=0, epochs=5),
    ('bootstrap',),
  ),
  Arena(
    'pooled-pixels',
    'images',
    'adam',
    0.1,
    14,
    PIXELS | dict(task='mnist', pool=2),
    dict(hidden=64, train_size=0, epochs=5),
    ('bootstrap',),
  ),
  Arena(
    'ptb300',
    'language_model',
    'sgd',
    0.5,
    6,
    TEXT | dict(task='ptb300', train_tokens=50_000),
    dict(hidden=128, embedding=128, train_tokens=200_000, epochs=6),
    ('momentum0.5', 'momentum0.8', 'nesterov0.8', 'nesterov0.9'),
  ),
  Arena(
    'ptb_c',
    'language_model',
    'adam',
    0.2,
    3,
    TEXT
    | dict(task='ptb_c', train_tokens=200_000, seq_len=150, clip=0.25, epochs=2)
    | dict(dropout=0.1, input_dropout=0.1, kappa=1.0),
    dict(hidden=128, embedding=128, train_tokens=1_000_000),
  ),
  *(
    Arena(
      f'sf-temps-S{size}',
      'stream',
      'adam',
      0.1,
      24 // size,
      dict(stream='sf-temps', window_size=size),
      {},
      influence='snap1',
    )
    for size in (1, 8)
  ),
)
"""The tasks."""


def contestants(arena: Arena) -> Iterator[Contestant]:
  """Yield the methods of a task.

  Args:
    arena: the task.
  """
  windows = arena.windows
  published: dict[str, Any] = dict(alpha=arena.alpha)
  constant: dict[str, Any] = dict(decay=False)
  horizon: dict[str, Any] = dict(average_horizon=HORIZON * windows)
  mean = constant | horizon | dict(averaging='running')
  common = [
    Contestant('tbptt', 'tbptt', {}),
    Contestant('momentum0', 'tbptt', dict(momentum=0.0)),
    Contestant('momentum-0.3', 'tbptt', dict(momentum=-0.3)),
    Contestant('by_window', 'tbptt', dict(momentum_windows=windows)),
    Contestant('fptt-kappa1', 'fptt', published | dict(kappa=1.0)),
    Contestant('fptt-kappa2', 'fptt', published | dict(kappa=2.0)),
    Contestant('fptt-update', 'fptt', COUPLED),
    Contestant('average', 'tbptt', mean),
    Contestant('schedule_free', 'tbptt', constant | dict(averaging='schedule_free')),
  ]
  if arena.script == 'stream':
    common = [one for one in common if one.name != 'by_window']
  else:
    yield Contestant('bptt', 'bptt', {})
  yield from common
  if arena.influence:
    for name, method, settings in common:
      chosen = settings | dict(influence=arena.influence)
      yield Contestant(f'{name}-{arena.influence}', method, chosen)
  for name in arena.extra:
    settings = EXTRAS[name]
    if name == 'bootstrap':
      settings = settings | horizon
      # Where early windows have no target, they get it first.
      if 'early' in arena.extra:
        settings = settings | EXTRAS['early']
    yield Contestant(name, 'tbptt', settings)


EXTRAS: dict[str, dict[str, Any]] = {
  'snap1': dict(influence='snap1'),
  'lookback': dict(influence='lookback'),
  'early': dict(every_window=True),
  'bootstrap': dict(bootstrap=0.9),
  # One window per step: the derivative of the step itself, by Adam without momentum.
  'immediate': dict(num_windows=ADDING['seq_len'], momentum=0.0),
  'momentum0.5': dict(momentum=0.5),
  'momentum0.8': dict(momentum=0.8),
  'nesterov0.8': dict(momentum=0.8, nesterov=True),
  'nesterov0.9': dict(momentum=0.9, nesterov=True),
}
"""Methods that only some tasks have, all with windows and without the regularizer."""


SMOKE: dict[str, dict[str, Any]] = {
  'online': dict(
    seq_len=12, hidden=4, batch_size=4, batches=4, eval_every=2, test_steps=20
  ),
  'add_task': dict(
    seq_len=12, hidden=4, batch_size=8, batches=4, eval_every=2, test_size=16
  ),
  'images': dict(
    task='arrays',
    data_dir='.npz',
    row=True,
    pool=1,
    hidden=8,
    batch_size=8,
    train_size=0,
    valid_size=8,
    epochs=1,
  ),
  'language_model': dict(
    data_dir='.', embedding=8, hidden=8, epochs=1, batch_size=4, seq_len=12
  ),
}
"""Settings at scale 'smoke', by script."""


SMOKE_WINDOWS = 2
"""K at scale 'smoke'."""


def settings_of(arena: Arena, contestant: Contestant, scale: str) -> dict[str, Any]:
  """Return the settings of a line for the configuration of its script.

  Args:
    arena: the task.
    contestant: the method.
    scale: 'smoke', 'cpu', 'short' or 'full'.
  """
  common: dict[str, Any] = dict(
    optimizer=arena.optimizer,
    lr=RATES[arena.optimizer][1],
    momentum=0.9,
    clip=1.0,
    decay=True,
    num_windows=arena.windows,
    # All rates, and all seeds, are trained side by side in one program.
    population=len(RATES['adam']),
    devices=1,
  )
  settings = common | arena.settings
  if scale != 'cpu':
    settings |= arena.larger
  settings |= contestant.settings
  if scale == 'smoke':
    settings |= SMOKE[arena.script] | dict(num_windows=SMOKE_WINDOWS)
    if arena.script == 'language_model':
      settings['task'] = 'text_c' if arena.name == 'ptb_c' else 'text'
    if 'momentum_windows' in settings:
      settings['momentum_windows'] = SMOKE_WINDOWS
  if contestant.method == 'bptt':
    del settings['num_windows']
  if arena.script == 'stream':
    del settings['num_windows'], settings['decay']
  return settings | dict(method=(contestant.method,))
