"""Language modeling on Penn Treebank, trained forward through time.

These are the tasks of Sec. 4.3 and Tables 4 and 5 of the paper. The text is read as B
parallel streams. Each sequence of T tokens continues the one before, and the hidden
state is carried on. The score is the perplexity of words, or bits per character. It is
measured on the validation text after each epoch, and on the test text once, with the
weights of the best epoch. --task sets the other defaults:

  ptb300  the authors' release for PTB-300: words, T=300, K=6, one LSTM of 256 units
          (525,000 parameters; the paper says 210,000), SGD at 2.0 with momentum 0.9,
          divided by 4 on a plateau, alpha 0.5, kappa 2, 100 epochs
  ptb_c   characters: AWD-LSTM with 3 layers of 1000 units (last 200, tied), T=150, K=3,
          Adam at 2e-3, alpha 0.2, kappa 2
  ptb_w   words: AWD-LSTM with 3 layers of 960 units (last 620) and a mixture of 15
          softmaxes, T=70, K=3, SGD at 20, then averaged, alpha 0.2, kappa 2, beta 0.7
  text, text_c
          a text of your own in UTF-8, by words or by characters, with the settings of
          ptb300

A text of your own is a folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt, or
one file, as in --task=text_c --data_dir=book.txt. The first 90 % of a file are the
training text, the next 5 % the validation text and the last 5 % the test text. By
characters, every character of the file is a token. By words, the end of a line is the
word <eos>. Tokens of the validation and test text that are not in the training text are
read as <unk>.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import numpy as np
import optax

from experiments import data, dynamic_evaluation
from experiments.core import (
  cells,
  cli,
  devices,
  files,
  flags,
  loop,
  optimizers,
  processes,
  recipe,
  sampling,
  trained,
)
from experiments.core.flags import check, option, redeclare
from experiments.core.plotting import Plot
from experiments.core.schedule import Member
from experiments.data import Text, streams
from experiments.data.streams import Place
import fptt_jax
from fptt_jax import nn

DESCRIBED = ('data_dir', 'vocabulary')
"""Entries of data.json."""


EVALUATION_STEPS = 4096
"""Number of steps per batch of an evaluation."""


SPREAD = 15
"""Number of steps by which a random length may exceed T: three standard deviations."""


SOURCES = {
  'ptb300': 'ptb',
  'ptb_w': 'ptb',
  'ptb_c': 'ptb_chars',
  'text': 'text',
  'text_c': 'text_chars',
}
"""Data sets by the values of --task."""


AWD: dict[str, Any] = dict(
  layers=3,
  tied=True,
  locked=True,
  activation_penalty=2.0,
  temporal_penalty=1.0,
  weight_decay=1.2e-6,
)
"""Settings of AWD-LSTM that characters and words share."""


TASKS: dict[str, dict[str, Any]] = {
  'ptb_c': dict(
    **AWD,
    seq_len=150,
    num_windows=3,
    alpha=0.2,
    optimizer='adam',
    lr=2e-3,
    clip=0.25,
    embedding=200,
    hidden=1000,
    last_hidden=200,
    dropout=0.1,
    hidden_dropout=0.25,
    input_dropout=0.1,
    weight_dropout=0.2,
    epochs=500,
    milestones=(300, 400),
    plateau_factor=1.0,
    min_lr=0.0,
  ),
  'ptb_w': dict(
    **AWD,
    seq_len=70,
    random_lengths=True,
    num_windows=3,
    alpha=0.2,
    beta=0.7,
    lr=20.0,
    momentum=0.0,
    clip=0.2,
    batch_size=6,
    embedding=280,
    hidden=960,
    last_hidden=620,
    experts=15,
    dropout=0.4,
    hidden_dropout=0.225,
    input_dropout=0.4,
    embedding_dropout=0.1,
    latent_dropout=0.29,
    weight_dropout=0.2,
    epochs=1000,
    average_after=5,
    plateau_factor=1.0,
    dynamic_evaluation=True,
  ),
}
"""Defaults that a task changes.

They are those of the release at full size, except for the last LSTM of PTB-w. With its
620 units the model has the 22 million parameters of the paper.
"""


@dataclasses.dataclass(frozen=True)
class Config(loop.EpochRecipe):
  """Settings of a language model."""

  task: str = option(
    'ptb300', 'text and defaults, see above', tuple(SOURCES), group='task'
  )
  data_dir: str = option(
    '',
    'folder with ptb.train.txt, ptb.valid.txt, ptb.test.txt (or .gz); or a .npz with '
    'the token ids train, valid, test, int32 [N], from 0, and the tokens vocabulary, '
    'str [V]; or, with --task=text or text_c, one text file, split in order '
    '90 / 5 / 5 %; default a download of Penn Treebank',
    group='task',
  )
  train_tokens: int = option(
    0,
    'number of tokens of the training text to use; 0 for all',
    within='[0, inf)',
    group='task',
  )
  num_windows: int | None = redeclare(
    loop.EpochRecipe,
    'num_windows',
    6,
    'K, windows per sequence, of methods that do not fix it',
  )
  kappa: float = redeclare(loop.EpochRecipe, 'kappa', 2.0)
  optimizer: str = redeclare(loop.EpochRecipe, 'optimizer', 'sgd')
  lr: float = redeclare(loop.EpochRecipe, 'lr', 2.0)
  momentum: float | None = redeclare(
    loop.EpochRecipe,
    'momentum',
    0.9,
    "decay of the first moment: b1 of 'adam', heavy-ball momentum of 'sgd'. May be "
    'negative',
  )
  epochs: int = redeclare(
    loop.EpochRecipe, 'epochs', 100, 'passes over the training text'
  )
  plateau_factor: float = redeclare(loop.EpochRecipe, 'plateau_factor', 4.0)
  min_lr: float = redeclare(loop.EpochRecipe, 'min_lr', 0.001)
  seq_len: int = option(300, 'T, tokens per sequence', within='[1, inf)', group='task')
  random_lengths: bool = option(
    False,
    'draw lengths near T or T/2, with the learning rate in proportion (AWD-LSTM)',
    group='task',
  )
  batch_size: int = option(
    128, 'B, parallel streams of training text', within='[1, inf)', group='training'
  )
  embedding: int = option(
    256, 'size of the token vectors', within='[1, inf)', group='model'
  )
  cell: str = option('lstm', 'recurrent layer', tuple(cells.CELLS), group='model')
  hidden: int = option(
    256, 'H, units per recurrent layer', within='[1, inf)', group='model'
  )
  layers: int = option(1, 'recurrent layers', within='[1, 100]', group='model')
  last_hidden: int = option(
    0, 'units of the last recurrent layer; default H', within='[0, inf)', group='model'
  )
  tied: bool = option(False, 'share the token vectors with the readout', group='model')
  experts: int = option(
    0,
    'softmaxes that the readout mixes; 0 for one plain softmax',
    within='[0, inf)',
    group='model',
  )
  locked: bool = option(
    False,
    'keep dropout masks for a window (variational dropout) instead of one step',
    group='model',
  )
  dropout: float = option(
    0.2,
    'rate of the dropout of the last recurrent outputs',
    within='[0, 1)',
    group='model',
  )
  hidden_dropout: float = option(
    0.0,
    'rate of the dropout of the other recurrent outputs',
    within='[0, 1)',
    group='model',
  )
  input_dropout: float = option(
    0.2, 'rate of the dropout of token vectors', within='[0, 1)', group='model'
  )
  embedding_dropout: float = option(
    0.0,
    'rate at which tokens are dropped from a window',
    within='[0, 1)',
    group='model',
  )
  latent_dropout: float = option(
    0.0,
    'rate of the dropout of latent vectors of the mixture',
    within='[0, 1)',
    group='model',
  )
  weight_dropout: float = option(
    0.0,
    'rate of the dropout of recurrent weights per window',
    within='[0, 1)',
    group='model',
  )
  activation_penalty: float = option(
    0.0,
    'factor of the mean square of the last outputs after dropout (AR)',
    within='[0, inf)',
    group='model',
  )
  temporal_penalty: float = option(
    0.0,
    'factor of the mean square of the changes of the last outputs (TAR)',
    within='[0, inf)',
    group='model',
  )
  dynamic_evaluation: bool = option(
    False,
    'also test with dynamic evaluation, tuned on the validation text',
    group='training',
  )
  dynamic_tokens: int = option(
    0,
    'number of tokens of the validation text for the tuning of dynamic evaluation; 0 '
    'for all',
    within='[0, inf)',
    group='training',
  )
  sample: int = option(
    0,
    'number of tokens to draw from the best run in --workdir, instead of training',
    within='[0, inf)',
    group='run',
  )
  prompt: str = option('', 'beginning of the text of --sample', group='run')
  temperature: float = option(
    1.0,
    'divisor of the logits of --sample; 0 takes the most probable token each time',
    within='[0, inf)',
    group='run',
  )
  sample_seed: int = option(0, 'seed of --sample', within='[0, inf)', group='run')

  def __post_init__(self) -> None:
    super().__post_init__()
    self._check_data()
    self._check_layers()
    cells.check_settings(self, self.cell)
    check(
      'tbptt_final' not in self.method,
      'method',
      self.method,
      'without tbptt_final, which takes no padded last sequence',
    )
    check(
      self.population <= 1 or not self.random_lengths,
      'population',
      self.population,
      '0 or 1 with --random_lengths, whose batches differ from run to run',
    )
    self.check_length(self.padded_len)
    self.check_bootstrap(False)

  def _check_data(self) -> None:
    """Validate settings of the text and of --sample that depend on each other.

    Raises:
      ValueError: a setting is missing, or has no effect without another one.
    """
    check(
      self.sample == 0 or bool(self.workdir),
      'workdir',
      self.workdir,
      'the folder of a trained run with --sample',
    )
    is_used = not self.prompt or self.sample > 0
    check(is_used, 'prompt', self.prompt, 'given with --sample')
    is_known = not self.task.startswith('text') or bool(self.data_dir or self.sample)
    check(is_known, 'data_dir', self.data_dir, f'given with --task={self.task!r}')

  def _check_layers(self) -> None:
    """Validate settings of the layers that depend on each other.

    Raises:
      ValueError: the layers do not fit together.
    """
    check(
      self.weight_dropout == 0 or self.cell in cells.WITH_W_H,
      'weight_dropout',
      self.weight_dropout,
      f'0 with --cell={self.cell}, which is not {", ".join(cells.WITH_W_H)}',
    )
    last = self.last_hidden or self.hidden
    # A mixture of softmaxes projects to the embedding size by itself.
    fits = not self.tied or self.experts > 0 or last == self.embedding
    check(
      fits,
      'last_hidden',
      last,
      f'the embedding size {self.embedding} with --tied and without --experts',
    )
    check(self.tied or not self.experts, 'experts', self.experts, '0 without --tied')

  @property
  def padded_len(self) -> int:
    """Number of steps of a batch, with its padding."""
    # Batches of random lengths have one shape, so that the program is compiled once.
    return self.seq_len + SPREAD * self.random_lengths

  @property
  def by_characters(self) -> bool:
    """True if a token is a character."""
    return SOURCES[self.task].endswith('_chars')


def widths(config: Config) -> list[int]:
  """Return the numbers of features of the embedding and of each recurrent layer."""
  inner = [config.hidden] * (config.layers - 1)
  return [config.embedding, *inner, config.last_hidden or config.hidden]


def make_model(config: Config, vocabulary_size: int) -> fptt_jax.Model:
  """Return a model of an embedding, recurrent layers and a readout.

  It has the dropouts and penalties of AWD-LSTM (Merity et al. 2018) that are above 0.

  Args:
    config: settings of the model.
    vocabulary_size: V.
  """
  dropout = nn.LockedDropout if config.locked else nnx.Dropout

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    embed = nnx.Embed(vocabulary_size, config.embedding, rngs=rngs)
    layers: list[Any] = [embed]
    if config.embedding_dropout:
      layers = [nn.EmbeddingDropout(embed, config.embedding_dropout)]
    layers.append(dropout(config.input_dropout))
    sizes = widths(config)
    for number, (features, hidden) in enumerate(itertools.pairwise(sizes), start=1):
      layer = cells.build(config, config.cell, features, hidden, None, rngs)
      if config.weight_dropout:
        layer = nn.WeightDrop(layer, config.weight_dropout)
      layers.append(layer)
      is_last = number == config.layers
      # The penalty on changes is for outputs before their dropout, the one on their
      # size for outputs after it, as in AWD-LSTM.
      if is_last and config.temporal_penalty:
        layers.append(nn.TemporalActivationPenalty(config.temporal_penalty))
      layers.append(dropout(config.dropout if is_last else config.hidden_dropout))
    if config.activation_penalty:
      layers.append(nn.ActivationPenalty(config.activation_penalty))
    layers.append(_make_readout(config, embed, rngs))
    return nn.Sequential(*layers)

  return nn.from_nnx(build)


def _make_readout(config: Config, embed: nnx.Embed, rngs: nnx.Rngs) -> Any:
  """Return the readout of a model.

  Args:
    config: settings of the model.
    embed: the embedding, which a tied readout shares.
    rngs: random streams of the weights.
  """
  hidden = widths(config)[-1]
  if config.experts:
    return nn.MixtureOfSoftmaxes(
      hidden, embed, config.experts, dropout=config.latent_dropout, rngs=rngs
    )
  if config.tied:
    return nn.TiedReadout(embed)
  return nnx.Linear(hidden, embed.num_embeddings, rngs=rngs)


def model_of(config: Config, described: dict[str, Any]) -> fptt_jax.Model:
  """Return the model of a folder whose data.json has the content `described`."""
  return make_model(config, len(described['vocabulary']))


def random_places(
  config: Config, length: int, rng: np.random.Generator
) -> Iterator[tuple[Place, float]]:
  """Yield the places of batches of random lengths, as in AWD-LSTM.

  Lengths are normal with standard deviation 5. The mean is T, or T/2 with probability
  0.05.

  Args:
    config: settings with T.
    length: number of tokens per stream.
    rng: random generator.

  Yields:
    (place of one batch, factor of the learning rate), which is the length over T.
  """
  start = 0
  while start < length - 1:
    mean = config.seq_len / (2 if rng.random() < 0.05 else 1)
    drawn = round(rng.normal(mean, 5))
    limited = int(np.clip(drawn, min(5, config.seq_len), config.padded_len))
    steps = min(limited, length - 1 - start)
    place = Place(np.array([start], np.int32), np.array([steps], np.int32))
    yield place, steps / config.seq_len
    start += steps


def portions(
  config: Config, method: str, length: int, seed: int, epoch: int
) -> Iterator[loop.Portion]:
  """Yield the portions of an epoch.

  Args:
    config: settings of the runs.
    method: training method.
    length: number of tokens per stream.
    seed: seed of the run.
    epoch: number of the epoch.
  """
  if config.random_lengths:
    pairs = random_places(config, length, np.random.default_rng((seed, epoch)))
  else:
    pairs = ((place, 1.0) for place in streams.places(length, config.seq_len))
  for place, lr_factor in pairs:
    yield loop.Portion(place, active_updates(config, method, place), lr_factor)


def active_updates(config: Config, method: str, place: Place) -> np.ndarray:
  """Return the number of windows of each batch that make an update.

  Args:
    config: settings of the runs.
    method: training method.
    place: the batches.

  Returns:
    int [N]: K or 1 by the method. A padded batch may end before its last windows, which
    make no update.
  """
  num_windows, updates = recipe.updates_per_sequence(config, method, config.padded_len)
  if place.steps is None or updates == config.inner_steps:
    return np.full(len(place.start), updates // config.inner_steps)
  plan = fptt_jax.make_windows(config.padded_len, num_windows=num_windows)
  has_tokens = plan.starts[None, :] < place.steps[:, None]
  return has_tokens.sum(1)


def num_updates(config: Config, method: str, length: int) -> int:
  """Return the number of optimizer updates of a run.

  With --random_lengths it is that of seed 0; other seeds differ a little from it.

  Args:
    config: settings of the runs.
    method: training method.
    length: number of tokens per stream.
  """
  windows = sum(
    int(portion.updates.sum())
    for epoch in range(1, config.epochs + 1)
    for portion in portions(config, method, length, 0, epoch)
  )
  return windows * config.inner_steps


def nats(trainer: fptt_jax.Trainer, params: Any, tokens: np.ndarray) -> float:
  """Return the mean cross-entropy per token of a text.

  The text is read as one stream, with the hidden state carried from its beginning to
  its end.

  Args:
    trainer: the trainer, which evaluates.
    params: the parameters.
    tokens: int32 [N].
  """
  hidden = None
  sums = {'loss': 0.0, 'count': 0}
  for batch in streams.sequences(tokens, EVALUATION_STEPS, 1):
    totals, hidden = trainer.evaluate(params, batch, hidden)
    # Summed as Python floats, since float32 would lose digits over a long text.
    sums = {name: sums[name] + totals[name].item() for name in sums}
  return sums['loss'] / sums['count']


def to_score(config: Config, mean_nats: float) -> float:
  """Return the score of a mean cross-entropy in nats.

  Returns:
    Bits per character, or the perplexity of words; infinity if it overflows or is NaN.
  """
  # math.exp raises an error above 709. A comparison with NaN is false.
  if not mean_nats < 700:
    return math.inf
  return mean_nats / math.log(2) if config.by_characters else math.exp(mean_nats)


def adapted(
  config: Config,
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  params: Any,
  text: Text,
  folder: Path,
) -> tuple[float, float]:
  """Return the validation and test cross-entropy by dynamic evaluation.

  Its settings are chosen on the validation text. The trials are kept in
  dynamic_evaluation.json, so that a search that was stopped goes on.

  Args:
    config: settings of the run.
    model: the model.
    loss: its loss.
    params: its trained parameters, on one device.
    text: the three texts.
    folder: the run's folder.

  Raises:
    Stopped: a signal asked for the end.
    UserError: the file of the trials cannot be read or written.
  """
  segment = 20 if config.by_characters else dynamic_evaluation.SEGMENT
  # Sequences must have whole segments.
  steps = math.ceil(config.seq_len / segment) * segment
  # A short text has a segment per stream.
  size = min(dynamic_evaluation.STATISTICS_STREAMS, len(text.train) // (segment + 1))
  training = processes.until_stopped(streams.sequences(text.train, steps, max(size, 1)))
  rms = dynamic_evaluation.gradient_statistics(
    model, loss, params, training, segment=segment
  )
  evaluate = dynamic_evaluation.evaluator(model, loss, params, rms, segment=segment)

  def read(tokens: np.ndarray) -> list[fptt_jax.Batch]:
    return list(streams.sequences(tokens, EVALUATION_STEPS // segment * segment, 1))

  # The search takes long, so signals are looked at between batches.
  def evaluate_until_stopped(
    batches: Iterable[fptt_jax.Batch], learning_rate: float, decay: float
  ) -> float:
    return evaluate(processes.until_stopped(batches), learning_rate, decay)

  valid = text.valid[: config.dynamic_tokens or None]
  path = folder / 'dynamic_evaluation.json'
  identity = _digest(params, rms, valid, [segment, dynamic_evaluation.EPSILON])
  trial = remembered(evaluate_until_stopped, path, identity)
  best = dynamic_evaluation.tune(trial, read(valid))[0]
  test = evaluate_until_stopped(read(text.test), best.learning_rate, best.decay)
  return best.nats, test


def _digest(*trees: Any) -> str:
  """Return a hash of the numbers in trees of arrays."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(trees):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def remembered(
  evaluate: Callable[[Iterable[fptt_jax.Batch], float, float], float],
  path: Path,
  identity: str,
) -> Callable[[Iterable[fptt_jax.Batch], float, float], float]:
  """Return an evaluation of one text that keeps its results in a file.

  Args:
    evaluate: (batches, learning rate, decay) -> mean cross-entropy per step in nats.
    path: the file.
    identity: hash of what the results depend on besides the settings. A file with
      another hash is ignored and written anew.

  Raises:
    UserError: the file cannot be read.
  """
  empty: dict[str, Any] = {'identity': identity, 'nats': {}}
  saved = processes.on_first_process(
    lambda: files.read_json(path, tuple(empty)) if files.exists(path) else empty
  )
  trials = saved if saved['identity'] == identity else empty

  def remember(
    batches: Iterable[fptt_jax.Batch], learning_rate: float, decay: float
  ) -> float:
    settings = f'learning rate {learning_rate:g}, decay {decay:g}'
    if settings not in trials['nats']:
      trials['nats'][settings] = evaluate(batches, learning_rate, decay)
      processes.on_first_process(files.write_json, path, trials)
    nats: float = trials['nats'][settings]
    return nats

  return remember


def make_task(config: Config, text: Text, method: str, members: int) -> loop.Task:
  """Return the task of the training loop, for several runs side by side.

  Args:
    config: settings of the runs.
    text: the three texts.
    method: training method.
    members: number of runs.

  Raises:
    UserError: the text is too short for B streams, or the devices do not fit.
  """
  side_by_side = streams.streams(text.train, config.batch_size)
  num_batches = math.ceil((len(side_by_side) - 1) / config.seq_len)
  model = make_model(config, len(text.vocabulary))
  loss = fptt_jax.losses.sequence_classification(len(text.vocabulary))
  schedule = recipe.decay_schedule(
    config.decay, num_updates(config, method, len(side_by_side))
  )
  trainer, meshes = _make_trainer(config, model, loss, method, members, schedule)
  padding = ((0, config.padded_len), (0, 0))
  return loop.Task(
    trainer,
    source=np.pad(side_by_side, padding).astype(np.int32),
    read=lambda source, place: streams.read(source, place, config.padded_len),
    split=True,
    fetch=None,
    meshes=meshes,
    portions=lambda epoch, seed: portions(
      config, method, len(side_by_side), seed, epoch
    ),
    num_epochs=config.epochs,
    num_batches=config.epochs * num_batches,
    rules=loop.epoch_rules(config),
    reporter=loop.EpochReporter(
      config,
      score='bpc' if config.by_characters else 'ppl',
      validate=lambda params: to_score(config, nats(trainer, params, text.valid)),
      test=lambda ended: _test_scores(config, trainer, model, loss, ended, text),
      train_score=lambda sums: to_score(config, sums['loss'] / sums['count']),
      higher_is_better=False,
      schedule=schedule,
      extra=describe_size(config, method),
    ),
  )


def _make_trainer(
  config: Config,
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  method: str,
  members: int,
  schedule: optax.Schedule | None,
) -> tuple[fptt_jax.Trainer, devices.Meshes]:
  """Return the trainer of one run and the devices for several.

  Args:
    config: settings of the runs.
    model: the model.
    loss: its loss.
    method: training method.
    members: number of runs.
    schedule: factor of the learning rate by the number of updates.
  """
  steps = recipe.window_steps(config, method, config.padded_len)
  meshes = devices.choose_meshes(
    config, config.batch_size, config.hidden, steps, members
  )
  trainer = optimizers.make_trainer(
    config,
    method,
    model,
    loss,
    config.padded_len,
    decay=schedule,
    mesh=meshes.batch,
    carry_hidden=True,
    wrap=loop.averaging_wrapper(config),
  )
  return trainer, meshes


def _test_scores(
  config: Config,
  trainer: fptt_jax.Trainer,
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  ended: loop.Ended,
  text: Text,
) -> dict[str, float]:
  """Return the test scores of a run, with dynamic evaluation if it is asked for.

  Args:
    config: settings of the run.
    trainer: its trainer.
    model: its model.
    loss: its loss.
    ended: the run.
    text: the three texts.
  """
  score = 'bpc' if config.by_characters else 'ppl'
  scores = {f'test_{score}': to_score(config, nats(trainer, ended.params, text.test))}
  if config.dynamic_evaluation:
    # Dynamic evaluation runs on one device, while parameters may be split over many.
    on_host = jax.tree.map(processes.gather_to_host, ended.params)
    here = jax.device_put(on_host, jax.local_devices()[0])
    valid, test = adapted(config, model, loss, here, text, ended.folder)
    scores[f'dynamic_valid_{score}'] = to_score(config, valid)
    scores[f'dynamic_test_{score}'] = to_score(config, test)
  return scores


def describe_size(config: Config, method: str) -> dict[str, int]:
  """Return K and the number of recurrent parameters, for summaries."""
  num_windows, _ = recipe.updates_per_sequence(config, method, config.padded_len)
  recurrent = cells.recurrent_parameters(config.cell, widths(config))
  return {'K': num_windows, 'recurrent_parameters': recurrent}


def train(
  text: Text, chosen: list[Member], folder: Path, evaluated: Callable[[], None]
) -> None:
  """Train runs of one method side by side.

  Args:
    text: the three texts.
    chosen: the runs.
    folder: the parent of the runs' folders.
    evaluated: callback after each evaluation of a run.
  """
  config = chosen[0].config
  task = make_task(config, text, chosen[0].method, len(chosen))
  loop.train(task, chosen, folder, evaluated)


def run(
  config: Config, folder: str, plot: Plot | None = None
) -> tuple[Path, list[dict[str, Any]]]:
  """Train a run for each method, seed and grid value.

  Args:
    config: settings of the runs.
    folder: folder of the runs.
    plot: plot to keep up to date; None draws nothing.

  Returns:
    (the folder, a summary per run).

  Raises:
    UserError: the text cannot be read or is too short, or the folder holds runs of
      another configuration.
    Stopped: a signal asked for the end.
  """
  text = data.load_text(SOURCES[config.task], config.data_dir)
  # Of the whole text, although --train_tokens may leave some out: it is a setting of
  # its own.
  fingerprint = data.fingerprint(text)
  text = text._replace(train=text.train[: config.train_tokens or None])
  kind = 'characters' if config.by_characters else 'words'
  about = (
    f'{config.task}: {len(text.train):,} / {len(text.valid):,} / {len(text.test):,} '
    f'{kind}, vocabulary {len(text.vocabulary):,}; T={config.seq_len}, '
    f'{config.layers} x {config.cell} {config.hidden}, batch {config.batch_size}'
  )
  identity = {'text_sha256': fingerprint}
  described = {'data_dir': config.data_dir, 'vocabulary': text.vocabulary}
  path = cli.open_task(config, folder, 'language_model', about, identity, described)
  # Batches of random lengths differ from run to run and cannot share a program.
  side_by_side = not config.random_lengths
  train_text = functools.partial(train, text)
  return path, cli.train_runs(config, path, train_text, plot, side_by_side)


def print_sample(config: Config) -> None:
  """Print a text that is drawn from the run in --workdir.

  Raises:
    UserError: there is no trained language model, or it does not know the prompt.
  """
  run = trained.load_run(config.workdir)
  if run.script != 'language_model':
    raise flags.UserError(
      f'--workdir={config.workdir} holds a run of {run.script}, not a language model.'
    )
  text = sampling.sample_text(
    run,
    config.sample,
    prompt=config.prompt,
    temperature=config.temperature,
    seed=config.sample_seed,
  )
  print(text)


def main(config: Config) -> None:
  """Train all runs and report them, or draw text from a trained run."""
  if config.sample:
    print_sample(config)
    return
  score = 'valid_ppl'
  label = 'validation perplexity'
  if config.by_characters:
    score = 'valid_bpc'
    label = 'validation bits per character'
  title = f'{config.task}, {config.layers} x {config.cell} {config.hidden}'
  plot = Plot(f'{score}.png', title, score, label, (('step', 'epoch'),))
  digits = 3 if config.by_characters else 2
  cli.run_task(config, run, cli.Report(plot, score, digits=digits))


if __name__ == '__main__':
  flags.run(main, Config, TASKS)
