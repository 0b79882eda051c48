"""Language modelling on Penn Treebank, trained forward through time (paper, Sec. 4.3,
Tables 4 and 5).

The text is read as B streams side by side; each sequence of T tokens continues the one
before, hidden state carried on. The score is measured on the validation text after each
epoch, and once, at the best epoch's weights, on the test text: perplexity of words,
bits per character. --task sets the other defaults:

  ptb300  the authors' release for PTB-300: words, T=300, K=6, one LSTM of 256 (525,000
  parameters; the paper says 210,000), SGD 2.0
          with momentum 0.9, divided by 4 on a plateau, alpha 0.5, kappa 2, 100 epochs
  ptb_c   characters: AWD-LSTM 3 x 1000 (last 200, tied), T=150, K=3, Adam 2e-3, alpha
    0.2, kappa 2
  ptb_w   words: AWD-LSTM 3 x 960 (last 620) with a mixture of 15 softmaxes, T=70, K=3,
          SGD 20 then averaged, alpha 0.2, kappa 2, beta 0.7
  text, text_c   a text of your own in UTF-8, by words or by characters, with the
  settings of ptb300

A text of your own is a folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt, or
one file, as in --task=text_c --data_dir=book.txt. The first 90 % of a file are the
training text, the next 5 % the validation text, the last 5 % the test text. By
characters every character of the file counts; by words the end of a line is the word
<eos>. What the training text has not is read as <unk> in the other two.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import numpy as np

from experiments import data, dynamic_evaluation
from experiments.core import (
  cells,
  cli,
  devices,
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
"""What data.json says of the text."""
EVALUATION_STEPS = 4096
SPREAD = 15
"""How many steps a sequence of random length may have beyond T: three standard
deviations.
"""

SOURCES = {
  'ptb300': 'ptb',
  'ptb_w': 'ptb',
  'ptb_c': 'ptb_chars',
  'text': 'text',
  'text_c': 'text_chars',
}
AWD: dict[str, Any] = dict(
  layers=3,
  tied=True,
  locked=True,
  activation_penalty=2.0,
  temporal_penalty=1.0,
  weight_decay=1.2e-6,
)
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
"""Defaults that a task changes: the release's at full size, but for PTB-w's last LSTM,
whose 620 units make the paper's 22 million parameters."""


@dataclasses.dataclass(frozen=True)
class Config(loop.EpochRecipe):
  """Settings of a language model."""

  task: str = option(
    'ptb300', 'text and defaults, see above', tuple(SOURCES), group='task'
  )
  data_dir: str = option(
    '',
    'folder with ptb.train.txt, ptb.valid.txt, ptb.test.txt (or .gz); or a .npz with '
    'the token ids train, valid, test, '
    'int32 [N], from 0, and the tokens vocabulary, str [V]; or, with --task=text or '
    'text_c, one text file, split '
    'in order 90 / 5 / 5 %; default a download of Penn Treebank',
    group='task',
  )
  train_tokens: int = option(
    0,
    'use only so many tokens of the training text; 0 for all',
    within='[0, inf)',
    group='task',
  )
  num_windows: int | None = redeclare(
    loop.EpochRecipe,
    'num_windows',
    6,
    'K, updates a sequence, for methods that do not fix it',
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
  seq_len: int = option(300, 'T, tokens of a sequence', within='[1, inf)', group='task')
  random_lengths: bool = option(
    False,
    'draw lengths near T, sometimes T/2, the learning rate in proportion (AWD-LSTM)',
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
    256, 'H, units of a recurrent layer', within='[1, inf)', group='model'
  )
  layers: int = option(1, 'recurrent layers', within='[1, 100]', group='model')
  last_hidden: int = option(
    0, 'units of the last one; default H', within='[0, inf)', group='model'
  )
  tied: bool = option(False, 'the readout shares the token vectors', group='model')
  experts: int = option(
    0,
    'softmaxes that the readout mixes; 0 for one plain softmax',
    within='[0, inf)',
    group='model',
  )
  locked: bool = option(
    False,
    'dropout masks last a window (variational) rather than one step',
    group='model',
  )
  dropout: float = option(
    0.2, 'on the outputs of the last recurrent layer', within='[0, 1)', group='model'
  )
  hidden_dropout: float = option(
    0.0, 'on the outputs of the others', within='[0, 1)', group='model'
  )
  input_dropout: float = option(
    0.2, 'on the token vectors', within='[0, 1)', group='model'
  )
  embedding_dropout: float = option(
    0.0, 'on whole tokens of the vocabulary, a window', within='[0, 1)', group='model'
  )
  latent_dropout: float = option(
    0.0, "on the mixture's latent vectors", within='[0, 1)', group='model'
  )
  weight_dropout: float = option(
    0.0, 'on recurrent matrices, a window', within='[0, 1)', group='model'
  )
  activation_penalty: float = option(
    0.0,
    'factor of the mean square of the last outputs, dropped out (AR)',
    within='[0, inf)',
    group='model',
  )
  temporal_penalty: float = option(
    0.0,
    'factor of the mean square of their changes from step to step (TAR)',
    within='[0, inf)',
    group='model',
  )
  dynamic_evaluation: bool = option(
    False,
    'test once more with dynamic evaluation, tuned on the validation text',
    group='training',
  )
  dynamic_tokens: int = option(
    0,
    'tokens of the validation text to tune dynamic evaluation on; 0 for all',
    within='[0, inf)',
    group='training',
  )
  sample: int = option(
    0,
    'draw so many tokens from the run in --workdir (its best one), instead of training',
    within='[0, inf)',
    group='run',
  )
  prompt: str = option('', 'what the text drawn by --sample begins with', group='run')
  temperature: float = option(
    1.0,
    'divides the logits of --sample; 0 takes the most probable token each time',
    within='[0, inf)',
    group='run',
  )
  sample_seed: int = option(0, 'seed of --sample', within='[0, inf)', group='run')

  def __post_init__(self) -> None:
    super().__post_init__()
    self._check_data()
    self._check_layers()
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

  def _check_data(self) -> None:
    """Validates settings of the text and of --sample that depend on each other.

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
    """Validates settings of the layers that depend on each other.

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
    """Steps a batch is laid out on."""
    return self.seq_len + SPREAD * self.random_lengths

  @property
  def by_characters(self) -> bool:
    """Whether a token is a character."""
    return SOURCES[self.task].endswith('_chars')


def widths(config: Config) -> list[int]:
  """Features of the token vectors, then of each recurrent layer."""
  return [
    config.embedding,
    *[config.hidden] * (config.layers - 1),
    config.last_hidden or config.hidden,
  ]


def make_model(config: Config, vocabulary_size: int) -> fptt_jax.Model:
  """Token vectors, recurrent layers and a readout, with the dropouts and penalties of
  AWD-LSTM (Merity et al. 2018) where they are above 0."""
  dropout = nn.LockedDropout if config.locked else nnx.Dropout

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    embed = nnx.Embed(vocabulary_size, config.embedding, rngs=rngs)
    layers: list[Any] = [
      nn.EmbeddingDropout(embed, config.embedding_dropout)
      if config.embedding_dropout
      else embed
    ]
    layers.append(dropout(config.input_dropout))
    for number, (features, hidden) in enumerate(
      itertools.pairwise(widths(config)), start=1
    ):
      layer = cells.CELLS[config.cell](features, hidden, None, rngs)
      layers.append(
        nn.WeightDrop(layer, config.weight_dropout) if config.weight_dropout else layer
      )
      if number == config.layers and config.temporal_penalty:
        layers.append(nn.TemporalActivationPenalty(config.temporal_penalty))
      layers.append(
        dropout(config.dropout if number == config.layers else config.hidden_dropout)
      )
    if config.activation_penalty:
      layers.append(nn.ActivationPenalty(config.activation_penalty))
    if config.experts:
      layers.append(
        nn.MixtureOfSoftmaxes(
          hidden, embed, config.experts, dropout=config.latent_dropout, rngs=rngs
        )
      )
    elif config.tied:
      layers.append(nn.TiedReadout(embed))
    else:
      layers.append(nnx.Linear(hidden, vocabulary_size, rngs=rngs))
    return nn.Sequential(*layers)

  return nn.from_nnx(build)


def model_of(config: Config, data: dict[str, Any]) -> fptt_jax.Model:
  """Make the model of a folder with this data.json."""
  return make_model(config, len(data['vocabulary']))


def random_places(
  config: Config, length: int, rng: np.random.Generator
) -> Iterator[tuple[Place, float]]:
  """Cuts streams into batches of random lengths (AWD-LSTM): normal around T with
  deviation 5, with probability 0.05 around T/2; with each the factor of the learning
  rate, its length over T.
  """
  start = 0
  while start < length - 1:
    mean = config.seq_len / (2 if rng.random() < 0.05 else 1)
    drawn = int(
      np.clip(round(rng.normal(mean, 5)), min(5, config.seq_len), config.padded_len)
    )
    steps = min(drawn, length - 1 - start)
    yield (
      Place(np.array([start], np.int32), np.array([steps], np.int32)),
      steps / config.seq_len,
    )
    start += steps


def portions(
  config: Config, method: str, length: int, seed: int, epoch: int
) -> Iterator[loop.Portion]:
  """An epoch's batches, with the updates they give and the factor of the learning
  rate.
  """
  if config.random_lengths:
    pairs = random_places(config, length, np.random.default_rng((seed, epoch)))
  else:
    pairs = ((place, 1.0) for place in streams.places(length, config.seq_len))
  for place, lr_factor in pairs:
    yield loop.Portion(place, active_updates(config, method, place), lr_factor)


def active_updates(config: Config, method: str, place: Place) -> np.ndarray:
  """Updates that each batch gives: K or one, fewer where a padded batch ends before the
  last windows.
  """
  num_windows, updates = recipe.updates_per_sequence(config, method, config.padded_len)
  if place.steps is None or updates == config.inner_steps:
    return np.full(len(place.start), updates // config.inner_steps)
  return (
    fptt_jax.make_windows(config.padded_len, num_windows=num_windows).starts[None, :]
    < place.steps[:, None]
  ).sum(1)


def nats(trainer: fptt_jax.Trainer, params: Any, tokens: np.ndarray) -> float:
  """Mean cross-entropy a token of a whole text read as one stream, hidden state carried
  from beginning to end.
  """
  hidden, sums = None, {'loss': 0.0, 'count': 0}
  for batch in streams.sequences(tokens, EVALUATION_STEPS, 1):
    if hidden is None:
      totals, hidden = trainer.evaluate(params, batch)
    else:
      totals, hidden = trainer.evaluate(params, batch, hidden)
    sums = {name: sums[name] + totals[name].item() for name in sums}
  return sums['loss'] / sums['count']


def to_score(config: Config, mean_nats: float) -> float:
  """Perplexity of words, infinite where it overflows or is NaN; bits per character."""
  if config.by_characters:
    return mean_nats / math.log(2)
  return math.exp(mean_nats) if mean_nats < 700 else math.inf


def adapted(
  config: Config, model: fptt_jax.Model, loss: fptt_jax.Loss, params: Any, text: Text
) -> tuple[float, float]:
  """(validation, test) cross-entropy by dynamic evaluation, its settings chosen on the
  validation text.
  """
  segment = 20 if config.by_characters else dynamic_evaluation.SEGMENT
  steps = -(-config.seq_len // segment) * segment
  training = processes.until_stopped(
    streams.sequences(text.train, steps, config.batch_size)
  )
  rms = dynamic_evaluation.gradient_statistics(
    model, loss, params, training, segment=segment
  )
  evaluate = dynamic_evaluation.evaluator(model, loss, params, rms, segment=segment)
  read = lambda tokens: list(
    streams.sequences(tokens, EVALUATION_STEPS // segment * segment, 1)
  )
  heeding = lambda batches, *settings: evaluate(
    processes.until_stopped(batches), *settings
  )
  best = dynamic_evaluation.tune(
    heeding, read(text.valid[: config.dynamic_tokens or None])
  )[0]
  return best.nats, heeding(read(text.test), best.learning_rate, best.decay)


def make_task(config: Config, text: Text, method: str, members: int) -> loop.Task:
  """What the loop over epochs needs, for so many runs side by side."""
  model = make_model(config, len(text.vocabulary))
  loss = fptt_jax.losses.sequence_classification(len(text.vocabulary))
  steps = recipe.window_steps(config, method, config.padded_len)
  meshes = devices.choose_meshes(
    config, config.batch_size, config.hidden, steps, members
  )
  wrap = loop.averaging_wrapper(config)
  score = 'bpc' if config.by_characters else 'ppl'
  side_by_side = streams.streams(text.train, config.batch_size)
  num_batches = -(-(len(side_by_side) - 1) // config.seq_len)
  decay = loop.decay_schedule(
    config,
    num_batches * recipe.updates_per_sequence(config, method, config.padded_len)[1],
  )
  trainer = optimizers.make_trainer(
    config,
    method,
    model,
    loss,
    config.padded_len,
    decay=decay,
    mesh=meshes.batch,
    carry_hidden=True,
    wrap=wrap,
  )

  def test(params: Any) -> dict[str, float]:
    scores = {f'test_{score}': to_score(config, nats(trainer, params, text.test))}
    if config.dynamic_evaluation:
      here = jax.device_put(
        jax.tree.map(processes.gather_to_host, params), jax.local_devices()[0]
      )
      best, found = adapted(config, model, loss, here, text)
      scores |= {
        f'dynamic_valid_{score}': to_score(config, best),
        f'dynamic_test_{score}': to_score(config, found),
      }
    return scores

  return loop.Task(
    trainer,
    source=np.pad(side_by_side, ((0, config.padded_len), (0, 0))).astype(np.int32),
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
      score=score,
      validate=lambda params: to_score(config, nats(trainer, params, text.valid)),
      test=test,
      train_score=lambda sums: to_score(config, sums['loss'] / sums['count']),
      higher_is_better=False,
      extra=describe_size(config, method),
    ),
  )


def describe_size(config: Config, method: str) -> dict[str, int]:
  """Returns K and the number of recurrent parameters, for summaries."""
  return {
    'K': recipe.updates_per_sequence(config, method, config.padded_len)[0],
    'recurrent_parameters': cells.recurrent_parameters(config.cell, widths(config)),
  }


def train(
  text: Text, chosen: list[Member], folder: Path, evaluated: Callable[[], None]
) -> None:
  """Trains runs of one method side by side."""
  config = chosen[0].config
  task = make_task(config, text, chosen[0].method, len(chosen))
  loop.train(task, chosen, folder, evaluated)


def run(
  config: Config, folder: str, plot: Plot | None = None
) -> tuple[Path, list[dict[str, Any]]]:
  """Trains by each method from each seed.

  Args:
    config: settings of the runs.
    folder: folder of the runs.
    plot: plot to redraw meanwhile; None draws nothing.

  Returns:
    The folder, and a summary per run.
  """
  text = data.load_text(SOURCES[config.task], config.data_dir)
  fingerprint = data.fingerprint(text)
  text = text._replace(train=text.train[: config.train_tokens or None])
  kind = 'characters' if config.by_characters else 'words'
  path = cli.open_task(
    config,
    folder,
    'language_model',
    f'{config.task}: {len(text.train):,} / {len(text.valid):,} / {len(text.test):,} '
    f'{kind}, vocabulary {len(text.vocabulary):,}; T={config.seq_len}, '
    f'{config.layers} x {config.cell} {config.hidden}, batch {config.batch_size}',
    {'text_sha256': fingerprint},
    {'data_dir': config.data_dir, 'vocabulary': text.vocabulary},
  )
  # Batches of random lengths differ from run to run, and cannot share a program.
  return path, cli.train_runs(
    config,
    path,
    functools.partial(train, text),
    plot,
    side_by_side=not config.random_lengths,
  )


def print_sample(config: Config) -> None:
  """Print a text drawn from the run in --workdir."""
  run = trained.load_run(config.workdir)
  if run.script != 'language_model':
    raise flags.UserError(
      f'--workdir={config.workdir} holds a run of {run.script}, not a language model.'
    )
  print(
    sampling.sample_text(
      run,
      config.sample,
      prompt=config.prompt,
      temperature=config.temperature,
      seed=config.sample_seed,
    )
  )


def main(config: Config) -> None:
  """Train and report, or draw text from a trained run."""
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
