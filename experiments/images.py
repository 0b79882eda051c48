"""Images as sequences: pixel MNIST, permuted MNIST and pixel CIFAR-10.

These are the tasks of Sec. 4.4 and Tables 2, 3 and 6 of the paper. An image is read
pixel by pixel (T=784 or 1024) or, with --row, row by row (T=28 or 32). It is classified
after its last step. The defaults are those of the authors' release: an LSTM of 128
units, 200 epochs of Adam at 1e-3, divided by 10 after epochs 50, 75 and 90, clip 1,
alpha 0.1 and K=10.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import numpy as np
import optax

from experiments import data
from experiments.core import (
  cells,
  cli,
  devices,
  flags,
  loop,
  optimizers,
  processes,
  recipe,
)
from experiments.core.flags import check, option, redeclare
from experiments.core.plotting import Plot
from experiments.core.schedule import Member
from experiments.data import Examples, Splits
import fptt_jax
from fptt_jax import nn

EVALUATION_BATCH = 1000
"""Number of images per batch of an evaluation."""


DESCRIBED = ('data_dir', 'num_steps', 'features', 'num_classes', 'moments', 'order')
"""Entries of data.json, see :func:`describe`."""


SPLIT_SEED = 0
"""Seed of the validation split, which is the same for all runs."""


@dataclasses.dataclass(frozen=True)
class Config(loop.EpochRecipe):
  """Settings of the image tasks."""

  task: str = option(
    'mnist',
    "'mnist', 'permuted' (MNIST), 'cifar10', or 'arrays': the .npz given as data_dir",
    ('mnist', 'permuted', 'cifar10', 'arrays'),
    group='task',
  )
  data_dir: str = option(
    '',
    'folder with the official files; or a .npz with the arrays train_images and '
    'test_images, uint8 [N, height, width, channels], and train_labels and '
    'test_labels, int32 [N], from 0; default a prepared copy or a download',
    group='task',
  )
  host_data: bool = option(
    False,
    "keep the images in the host's memory and pass them to the device in chunks, for "
    'more images than it holds',
    group='task',
  )
  row: bool = option(
    False,
    'read an image row by row instead of pixel by pixel: faster, but not the task of '
    'the paper',
    group='task',
  )
  pool: int = option(
    1,
    'average blocks of this many by this many pixels into one; it must divide height '
    'and width',
    within='[1, inf)',
    group='task',
  )
  permutation_seed: int = option(
    0, "seed of the order of steps of 'permuted'", within='[0, inf)', group='task'
  )
  train_size: int = option(
    0, 'number of training images to use; 0 for all', within='[0, inf)', group='task'
  )
  valid_size: int = option(
    5000,
    'number of training images held out for validation',
    within='[1, inf)',
    group='task',
  )
  cell: str = option('lstm', 'recurrent layer', tuple(cells.CELLS), group='model')
  hidden: int = option(
    128, 'H, units per recurrent layer', within='[1, inf)', group='model'
  )
  layers: int = option(1, 'recurrent layers', within='[1, 100]', group='model')
  forget_bias: float = option(
    1.0, "initial bias of the LSTM's forget gate", within='(-inf, inf)', group='model'
  )
  readout_hidden: int = option(
    0,
    'units of a hidden layer (relu) in the readout; 0 for a linear readout',
    within='[0, inf)',
    group='model',
  )
  dropout: float = option(
    0.0,
    'rate of the dropout of the last recurrent outputs',
    within='[0, 1)',
    group='model',
  )
  divergence: str = option(
    'class_ema',
    'earlier estimate Q toward which the divergence term draws the predictions',
    ('class_ema', 'last_epoch', 'example', 'uniform', 'none'),
    group='model',
  )
  reconstruction: float = option(
    0.0,
    "weight of r-LSTM's auxiliary loss, which reconstructs inputs before a random "
    'step; 0 leaves it out',
    within='[0, inf)',
    group='model',
  )
  reconstruction_segment: int = option(
    0, 'number of steps to reconstruct; default T/10', within='[0, inf)', group='model'
  )
  num_windows: int | None = redeclare(
    loop.EpochRecipe,
    'num_windows',
    10,
    'K, windows per sequence, of methods that do not fix it',
  )
  alpha: float = redeclare(loop.EpochRecipe, 'alpha', 0.1)
  clip: float = redeclare(loop.EpochRecipe, 'clip', 1.0)
  batch_size: int = option(
    128, 'B, sequences per batch', within='[1, inf)', group='training'
  )
  epochs: int = redeclare(
    loop.EpochRecipe, 'epochs', 200, 'passes over the training images'
  )
  milestones: tuple[int, ...] = redeclare(loop.EpochRecipe, 'milestones', (50, 75, 90))

  def __post_init__(self) -> None:
    super().__post_init__()
    cells.check_settings(self, self.cell)
    self.check_bootstrap(self.divergence == 'none')
    # One step cannot be reconstructed from the steps before it.
    check(
      self.reconstruction_segment != 1,
      'reconstruction_segment',
      self.reconstruction_segment,
      '0 or at least 2',
    )
    check(
      self.task != 'arrays' or self.data_dir.endswith('.npz'),
      'data_dir',
      self.data_dir,
      "a .npz with --task='arrays'",
    )


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Images of a task, and how they become sequences.

  Attributes:
    splits: images and labels.
    moments: mean and standard deviation by which pixels are normalized.
    rows: whether a step is a row of the image, not a pixel.
    order: int [T], the fixed order of the steps; None keeps them.
    num_classes: C.
    pool: pixels, in height and in width, of which a mean makes one.
  """

  splits: Splits
  moments: tuple[float, float]
  rows: bool
  order: np.ndarray | None
  num_classes: int
  pool: int = 1

  def read(self, images: Any, labels: Any, ids: Any) -> fptt_jax.Batch:
    """Return a batch of sequences; JAX traces this function.

    Args:
      images: uint8 [B, height, width, channels].
      labels: int32 [B].
      ids: int32 [B], numbers of the examples, if the loss needs them; else None.
    """
    inputs = data.to_sequences(images, self.moments, self.rows, self.order, self.pool)
    return fptt_jax.Batch(inputs, labels if ids is None else (labels, ids))

  @property
  def shape(self) -> tuple[int, int]:
    """Numbers of steps T and of features D."""
    first = self.splits.train.images[:1]
    sequence = data.to_sequences(first, self.moments, self.rows, None, self.pool)
    return sequence.shape[0], sequence.shape[2]


def load(config: Config) -> tuple[Sequences, str]:
  """Load the images of a task.

  Args:
    config: settings of the task.

  Returns:
    (sequences, hash of the images).

  Raises:
    UserError: the images cannot be read, or the validation split does not fit them.
  """
  name = 'mnist' if config.task == 'permuted' else config.task
  images = data.load_images(name, config.data_dir)
  # Of all images, although --train_size may leave some out: it is a setting of its own.
  fingerprint = data.fingerprint(images)
  splits = data.hold_out(images, config.valid_size, SPLIT_SEED)
  if config.train_size:
    used = slice(config.train_size)
    train = Examples(splits.train.images[used], splits.train.labels[used])
    splits = splits._replace(train=train)
  num_classes = max(2, 1 + int(images.train_labels.max()))
  _, height, width, _ = splits.train.images.shape
  if height % config.pool or width % config.pool:
    raise flags.UserError(
      f'--pool must divide the {height} rows and {width} columns of an image, got '
      f'{config.pool}.'
    )
  sequences = Sequences(
    splits, data.MOMENTS[name], config.row, None, num_classes, config.pool
  )
  if config.task == 'permuted':
    order = data.permutation(sequences.shape[0], config.permutation_seed)
    sequences = dataclasses.replace(sequences, order=order)
  return sequences, fingerprint


def segment(config: Config, num_steps: int) -> int:
  """Return the number of steps that r-LSTM reconstructs."""
  return config.reconstruction_segment or max(2, num_steps // 10)


def check_fit(config: Config, num_steps: int) -> None:
  """Check that settings fit the length of the sequences.

  Args:
    config: settings of the task.
    num_steps: T.

  Raises:
    ValueError: K, truncation_steps or the reconstruction do not fit.
  """
  config.check_length(num_steps)
  if not config.reconstruction:
    return
  length = segment(config, num_steps)
  for method in config.method:
    # A segment must lie within one window, also within the shortest.
    num_windows, _ = recipe.updates_per_sequence(config, method, num_steps)
    size = num_steps // num_windows
    expected = f"at most {size}, the shortest window's steps by method {method!r}"
    check(length <= size, 'reconstruction_segment', length, expected)
    check(
      method != 'tbptt_final',
      'reconstruction',
      config.reconstruction,
      "0 with the method 'tbptt_final'",
    )


def widths(config: Config, features: int) -> list[int]:
  """Return the numbers of features of the inputs and of each recurrent layer."""
  return [features, *[config.hidden] * config.layers]


def make_model(
  config: Config, num_steps: int, features: int, num_classes: int
) -> fptt_jax.Model:
  """Return a model of recurrent layers and a readout.

  Args:
    config: settings of the model.
    num_steps: T, for the default length of the reconstruction.
    features: D.
    num_classes: C.
  """

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    layers = [
      cells.build(config, config.cell, width, config.hidden, config.forget_bias, rngs)
      for width in widths(config, features)[:-1]
    ]
    # The auxiliary loss reconstructs the inputs, which only the first layer sees.
    if config.reconstruction:
      layers[0] = nn.Reconstruction(
        layers[0],
        features,
        segment=segment(config, num_steps),
        weight=config.reconstruction,
        rngs=rngs,
      )
    if config.dropout:
      layers.append(nnx.Dropout(config.dropout))
    width = config.hidden
    if config.readout_hidden:
      layers += [nnx.Linear(width, config.readout_hidden, rngs=rngs), nnx.relu]
      width = config.readout_hidden
    layers.append(nnx.Linear(width, num_classes, rngs=rngs))
    return nn.Sequential(*layers)

  return nn.from_nnx(build)


def describe(config: Config, sequences: Sequences) -> dict[str, Any]:
  """Return the facts about the images that a trained model needs, for data.json.

  Args:
    config: settings of the task.
    sequences: the images.
  """
  num_steps, features = sequences.shape
  return {
    'data_dir': config.data_dir,
    'num_steps': num_steps,
    'features': features,
    'num_classes': sequences.num_classes,
    'moments': sequences.moments,
    'order': None if sequences.order is None else sequences.order.tolist(),
  }


def model_of(config: Config, described: dict[str, Any]) -> fptt_jax.Model:
  """Return the model of a folder whose data.json has the content `described`."""
  return make_model(
    config, described['num_steps'], described['features'], described['num_classes']
  )


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Reading of batches from the training images.

  Attributes:
    sequences: the images.
    by_example: whether the loss needs the numbers of the examples.
  """

  sequences: Sequences
  by_example: bool

  def pick(self, source: Any, chosen: Any) -> tuple[Any, Any, Any]:
    """Return the images, labels and numbers of the chosen examples.

    Args:
      source: (images, labels) of all examples, on the device or on the host.
      chosen: int32 [..., B], numbers of examples.
    """
    images, labels = source
    return images[chosen], labels[chosen], chosen if self.by_example else None

  def read_source(self, source: Any, chosen: Any) -> fptt_jax.Batch:
    """Return a batch from images on the device."""
    return self.sequences.read(*self.pick(source, chosen))

  def read_fetched(self, _: Any, picked: Any) -> fptt_jax.Batch:
    """Return a batch from images that :meth:`fetch` has read on the host."""
    images, labels, ids = picked
    return self.sequences.read(images, labels, ids)

  def fetch(self, chosen: Any) -> tuple[Any, Any, Any]:
    """Return the chosen examples from the host's memory."""
    return self.pick(self.sequences.splits.train, chosen)


def _make_trainer(
  config: Config,
  sequences: Sequences,
  method: str,
  members: int,
  count: int,
  schedule: optax.Schedule | None,
) -> tuple[fptt_jax.Trainer, devices.Meshes]:
  """Return the trainer of one run and the devices for several.

  Args:
    config: settings of the runs.
    sequences: the images.
    method: training method.
    members: number of runs.
    count: number of batches per epoch.
    schedule: factor of the learning rate by the number of updates.
  """
  num_steps, features = sequences.shape
  size = len(sequences.splits.train.labels)
  loss = fptt_jax.losses.terminal_classification(
    sequences.num_classes,
    divergence=config.divergence,
    num_examples=size if config.divergence == 'example' else None,
  )
  steps = recipe.window_steps(config, method, num_steps)
  meshes = devices.choose_meshes(
    config, config.batch_size, config.hidden, steps, members
  )
  trainer = optimizers.make_trainer(
    config,
    method,
    make_model(config, num_steps, features, sequences.num_classes),
    loss,
    num_steps,
    decay=schedule,
    mesh=meshes.batch,
    num_batches=config.epochs * count,
    wrap=loop.averaging_wrapper(config),
  )
  return trainer, meshes


def make_task(
  config: Config, sequences: Sequences, method: str, members: int
) -> loop.Task:
  """Return the task of the training loop, for several runs side by side.

  Args:
    config: settings of the runs.
    sequences: the images.
    method: training method.
    members: number of runs.

  Raises:
    UserError: a batch is larger than the training split, or the devices do not fit.
  """
  num_steps, features = sequences.shape
  size = len(sequences.splits.train.labels)
  # Images that do not fill a batch are left out, others in each epoch.
  count = size // config.batch_size
  if not count:
    raise flags.UserError(
      f'--batch_size must be at most the {size} training images, got '
      f'{config.batch_size}.'
    )
  _, updates = recipe.updates_per_sequence(config, method, num_steps)
  schedule = recipe.decay_schedule(config.decay, config.epochs * count * updates)
  trainer, meshes = _make_trainer(config, sequences, method, members, count, schedule)
  reader = _Reader(sequences, by_example=config.divergence == 'example')
  # Of several processes, each reads only its share of a batch.
  on_host = config.host_data or jax.process_count() > 1

  def portions(epoch: int, seed: int) -> Iterator[loop.Portion]:
    order = np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)
    batches = order[: count * config.batch_size].reshape(count, -1)
    yield loop.Portion(batches, np.full(count, updates // config.inner_steps))

  accuracy = _make_accuracy(trainer, reader)
  return loop.Task(
    trainer,
    # As bytes: all epochs read the images from the device's memory.
    source=() if on_host else tuple(sequences.splits.train),
    read=reader.read_fetched if on_host else reader.read_source,
    split=False,
    fetch=reader.fetch if on_host else None,
    meshes=meshes,
    portions=portions,
    num_epochs=config.epochs,
    num_batches=config.epochs * count,
    rules=loop.epoch_rules(config),
    reporter=loop.EpochReporter(
      config,
      score='accuracy',
      validate=lambda params: accuracy(params, sequences.splits.valid),
      test=lambda ended: {
        'test_accuracy': accuracy(ended.params, sequences.splits.test)
      },
      train_score=percent,
      higher_is_better=True,
      schedule=schedule,
      extra=describe_size(config, method, num_steps, features),
    ),
  )


def _make_accuracy(
  trainer: fptt_jax.Trainer, reader: _Reader
) -> Callable[[Any, Examples], float]:
  """Return a function (params, examples) -> accuracy in percent.

  Args:
    trainer: the trainer, which evaluates.
    reader: reading of the images.
  """
  # Compiled once for all evaluations.
  read = jax.jit(reader.sequences.read)

  def accuracy(params: Any, examples: Examples) -> float:
    sums = {'accuracy': 0.0, 'count': 0}
    for start in range(0, len(examples.labels), EVALUATION_BATCH):
      part = slice(start, start + EVALUATION_BATCH)
      images, labels = examples.images[part], examples.labels[part]
      # The loss needs numbers of examples, but they do not affect the accuracy.
      ids = np.arange(len(labels), dtype=np.int32) if reader.by_example else None
      batch = processes.replicated(read(images, labels, ids))
      totals, _ = trainer.evaluate(params, batch)
      sums = {name: sums[name] + totals[name].item() for name in sums}
    return percent(sums)

  return accuracy


def describe_size(
  config: Config, method: str, num_steps: int, features: int
) -> dict[str, int]:
  """Return K and the number of recurrent parameters, for summaries."""
  num_windows, _ = recipe.updates_per_sequence(config, method, num_steps)
  recurrent = cells.recurrent_parameters(config.cell, widths(config, features))
  return {'K': num_windows, 'recurrent_parameters': recurrent}


def percent(totals: dict[str, float]) -> float:
  """Return the accuracy in percent from sums over sequences."""
  return 100 * totals['accuracy'] / totals['count']


def train(
  sequences: Sequences,
  chosen: list[Member],
  folder: Path,
  evaluated: Callable[[], None],
) -> None:
  """Train runs of one method side by side.

  Args:
    sequences: the images.
    chosen: the runs.
    folder: the parent of the runs' folders.
    evaluated: callback after each evaluation of a run.
  """
  config = chosen[0].config
  task = make_task(config, sequences, chosen[0].method, len(chosen))
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
    UserError: the data cannot be read, settings do not fit them, or the folder holds
      runs of another configuration.
    Stopped: a signal asked for the end.
  """
  sequences, fingerprint = load(config)
  num_steps, features = sequences.shape
  flags.checked(check_fit, config, num_steps)
  sizes = ' / '.join(f'{len(part.labels):,}' for part in sequences.splits)
  about = (
    f'{config.task}: {sizes} images, T={num_steps}, D={features}; {config.cell} '
    f'{config.hidden}'
  )
  identity = {'images_sha256': fingerprint}
  described = describe(config, sequences)
  path = cli.open_task(config, folder, 'images', about, identity, described)
  return path, cli.train_runs(config, path, functools.partial(train, sequences), plot)


def main(config: Config) -> None:
  """Train all runs and report them."""
  title = f'{config.task}, {config.cell} {config.hidden}'
  label = 'validation accuracy, %'
  plot = Plot('accuracy.png', title, 'valid_accuracy', label, (('step', 'epoch'),))
  cli.run_task(config, run, cli.Report(plot, 'valid_accuracy', digits=2, best=max))


if __name__ == '__main__':
  flags.run(main, Config)
