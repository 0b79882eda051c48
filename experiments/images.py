"""Images as sequences: pixel MNIST, permuted MNIST, pixel CIFAR-10 (paper, Sec. 4.4,
Tables 2, 3 and 6).

An image is read pixel by pixel (T=784 or 1024), with --row row by row (T=28 or 32), and
classified after its last step. The defaults are the authors' release's: LSTM 128, Adam
1e-3 divided by 10 after epochs 50, 75 and 90 of 200, clip 1, alpha 0.1, K=10.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import numpy as np

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
DESCRIBED = ('data_dir', 'num_steps', 'features', 'num_classes', 'moments', 'order')
"""What data.json says of the images, see :func:`describe`."""
SPLIT_SEED = 0


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
    'test_images, uint8 [N, height, width, '
    'channels], and train_labels and test_labels, int32 [N], from 0; default a '
    'prepared copy or a download',
    group='task',
  )
  host_data: bool = option(
    False,
    "keep the images in the host's memory, hand them over chunk by chunk: for more "
    'than a device holds',
    group='task',
  )
  row: bool = option(
    False,
    'a row of the image a step instead of a pixel: quick, and another task than the '
    'paper has',
    group='task',
  )
  permutation_seed: int = option(
    0, "draws the fixed order of steps of 'permuted'", within='[0, inf)', group='task'
  )
  train_size: int = option(
    0, 'use only so many training images; 0 for all', within='[0, inf)', group='task'
  )
  valid_size: int = option(
    5000, 'training images held out to validate on', within='[1, inf)', group='task'
  )
  cell: str = option('lstm', 'recurrent layer', tuple(cells.CELLS), group='model')
  hidden: int = option(
    128, 'H, units of a recurrent layer', within='[1, inf)', group='model'
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
    0.0, 'on the outputs of the last recurrent layer', within='[0, 1)', group='model'
  )
  divergence: str = option(
    'class_ema',
    'what Q of the divergence term is',
    ('class_ema', 'last_epoch', 'example', 'uniform', 'none'),
    group='model',
  )
  reconstruction: float = option(
    0.0,
    "weight of r-LSTM's auxiliary loss, which reconstructs inputs before a random "
    'step; 0 is none',
    within='[0, inf)',
    group='model',
  )
  reconstruction_segment: int = option(
    0, 'steps to reconstruct; default T/10', within='[0, inf)', group='model'
  )
  num_windows: int | None = redeclare(
    loop.EpochRecipe,
    'num_windows',
    10,
    'K, updates a sequence, for methods that do not fix it',
  )
  alpha: float = redeclare(loop.EpochRecipe, 'alpha', 0.1)
  clip: float = redeclare(loop.EpochRecipe, 'clip', 1.0)
  batch_size: int = option(128, 'B', within='[1, inf)', group='training')
  epochs: int = redeclare(
    loop.EpochRecipe, 'epochs', 200, 'passes over the training images'
  )
  milestones: tuple[int, ...] = redeclare(loop.EpochRecipe, 'milestones', (50, 75, 90))

  def __post_init__(self) -> None:
    super().__post_init__()
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
  """A task's images and how they are read.

  Attributes:
    splits: images and labels.
    moments: mean and standard deviation they are normalized by.
    rows: whether a step is a row.
    order: int [T], the fixed order of the steps, or None.
    num_classes: C.
  """

  splits: Splits
  moments: tuple[float, float]
  rows: bool
  order: np.ndarray | None
  num_classes: int

  def read(self, images: Any, labels: Any, ids: Any) -> fptt_jax.Batch:
    """Examples [B, ...] time-major; with their numbers where the loss wants them, else
    None. Traced.
    """
    return fptt_jax.Batch(
      data.to_sequences(images, self.moments, self.rows, self.order),
      labels if ids is None else (labels, ids),
    )

  @property
  def shape(self) -> tuple[int, int]:
    """(T, D)."""
    sequence = data.to_sequences(
      self.splits.train.images[:1], self.moments, self.rows, None
    )
    return sequence.shape[0], sequence.shape[2]


def load(config: Config) -> tuple[Sequences, str]:
  """The task's sequences, and a hash of the images whatever files they came from."""
  name = 'mnist' if config.task == 'permuted' else config.task
  images = data.load_images(name, config.data_dir)
  fingerprint = data.fingerprint(images)
  splits = data.hold_out(images, config.valid_size, SPLIT_SEED)
  if config.train_size:
    splits = splits._replace(
      train=Examples(*(part[: config.train_size] for part in splits.train))
    )
  num_classes = max(2, 1 + int(images.train_labels.max()))
  sequences = Sequences(splits, data.MOMENTS[name], config.row, None, num_classes)
  if config.task == 'permuted':
    sequences = dataclasses.replace(
      sequences, order=data.permutation(sequences.shape[0], config.permutation_seed)
    )
  return sequences, fingerprint


def segment(config: Config, num_steps: int) -> int:
  """L, the steps that r-LSTM reconstructs."""
  return config.reconstruction_segment or max(2, num_steps // 10)


def check_fit(config: Config, num_steps: int) -> None:
  """Raises if K, truncation_steps or the reconstruction do not fit sequences of
  `num_steps` steps.
  """
  config.check_length(num_steps)
  for method in config.method if config.reconstruction else ():
    size = num_steps // recipe.updates_per_sequence(config, method, num_steps)[0]
    expected = f"at most {size}, the shortest window's steps by method {method!r}"
    check(
      segment(config, num_steps) <= size,
      'reconstruction_segment',
      segment(config, num_steps),
      expected,
    )
    check(
      method != 'tbptt_final',
      'reconstruction',
      config.reconstruction,
      "0 with the method 'tbptt_final'",
    )


def widths(config: Config, features: int) -> list[int]:
  """Features of the inputs, then of each recurrent layer."""
  return [features, *[config.hidden] * config.layers]


def make_model(
  config: Config, num_steps: int, features: int, num_classes: int
) -> fptt_jax.Model:
  """Recurrent layers and a readout."""

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    layers = [
      cells.CELLS[config.cell](width, config.hidden, config.forget_bias, rngs)
      for width in widths(config, features)[:-1]
    ]
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
    if config.readout_hidden:
      layers += [nnx.Linear(config.hidden, config.readout_hidden, rngs=rngs), nnx.relu]
    layers.append(
      nnx.Linear(config.readout_hidden or config.hidden, num_classes, rngs=rngs)
    )
    return nn.Sequential(*layers)

  return nn.from_nnx(build)


def describe(config: Config, sequences: Sequences) -> dict[str, Any]:
  """Describe the images for data.json: what a trained model needs to know of them."""
  num_steps, features = sequences.shape
  return {
    'data_dir': config.data_dir,
    'num_steps': num_steps,
    'features': features,
    'num_classes': sequences.num_classes,
    'moments': sequences.moments,
    'order': None if sequences.order is None else sequences.order.tolist(),
  }


def model_of(config: Config, data: dict[str, Any]) -> fptt_jax.Model:
  """Make the model of a folder with this data.json."""
  return make_model(config, data['num_steps'], data['features'], data['num_classes'])


def make_task(
  config: Config, sequences: Sequences, method: str, members: int
) -> loop.Task:
  """What the loop over epochs needs, for so many runs side by side."""
  num_steps, features = sequences.shape
  size = len(sequences.splits.train.labels)
  by_example = config.divergence == 'example'
  loss = fptt_jax.losses.terminal_classification(
    sequences.num_classes,
    divergence=config.divergence,
    num_examples=size if by_example else None,
  )
  model = make_model(config, num_steps, features, sequences.num_classes)
  steps = recipe.window_steps(config, method, num_steps)
  meshes = devices.choose_meshes(
    config, config.batch_size, config.hidden, steps, members
  )
  wrap = loop.averaging_wrapper(config)
  count = size // config.batch_size
  if not count:
    raise flags.UserError(
      f'--batch_size must be at most the {size} training images, got '
      f'{config.batch_size}.'
    )
  updates = recipe.updates_per_sequence(config, method, num_steps)[1]
  decay = loop.decay_schedule(config, count * updates)
  trainer = optimizers.make_trainer(
    config, method, model, loss, num_steps, decay=decay, mesh=meshes.batch, wrap=wrap
  )
  updates //= config.inner_steps
  images, labels = sequences.splits.train
  pick = lambda images, labels, chosen: (
    images[chosen],
    labels[chosen],
    chosen if by_example else None,
  )
  on_host = config.host_data or jax.process_count() > 1
  read = (
    (lambda _, rows: sequences.read(*rows))
    if on_host
    else (lambda source, chosen: sequences.read(*pick(*source, chosen)))
  )
  read_now = jax.jit(sequences.read)

  def portions(epoch: int, seed: int) -> Iterator[loop.Portion]:
    order = np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)
    yield loop.Portion(
      order[: count * config.batch_size].reshape(count, -1), np.full(count, updates)
    )

  def accuracy(params: Any, examples: Examples) -> float:
    sums = {'accuracy': 0.0, 'count': 0}
    for start in range(0, len(examples.labels), EVALUATION_BATCH):
      part = Examples(*(array[start : start + EVALUATION_BATCH] for array in examples))
      ids = np.arange(len(part.labels), dtype=np.int32) if by_example else None
      totals, _ = trainer.evaluate(params, processes.replicated(read_now(*part, ids)))
      sums = {name: sums[name] + totals[name].item() for name in sums}
    return percent(sums)

  return loop.Task(
    trainer,
    source=() if on_host else (images, labels),  # Bytes, on the device for all epochs.
    read=read,
    split=False,
    fetch=(lambda chosen: pick(images, labels, chosen)) if on_host else None,
    meshes=meshes,
    portions=portions,
    num_epochs=config.epochs,
    num_batches=config.epochs * count,
    rules=loop.epoch_rules(config),
    reporter=loop.EpochReporter(
      config,
      score='accuracy',
      validate=lambda params: accuracy(params, sequences.splits.valid),
      test=lambda params: {'test_accuracy': accuracy(params, sequences.splits.test)},
      train_score=percent,
      higher_is_better=True,
      extra=describe_size(config, method, num_steps, features),
    ),
  )


def describe_size(
  config: Config, method: str, num_steps: int, features: int
) -> dict[str, int]:
  """Returns K and the number of recurrent parameters, for summaries."""
  return {
    'K': recipe.updates_per_sequence(config, method, num_steps)[0],
    'recurrent_parameters': cells.recurrent_parameters(
      config.cell, widths(config, features)
    ),
  }


def percent(totals: dict[str, float]) -> float:
  """Accuracy in percent."""
  return 100 * totals['accuracy'] / totals['count']


def train(
  sequences: Sequences,
  chosen: list[Member],
  folder: Path,
  evaluated: Callable[[], None],
) -> None:
  """Trains runs of one method side by side."""
  config = chosen[0].config
  task = make_task(config, sequences, chosen[0].method, len(chosen))
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
  sequences, fingerprint = load(config)
  num_steps, features = sequences.shape
  flags.checked(check_fit, config, num_steps)
  sizes = ' / '.join(f'{len(part.labels):,}' for part in sequences.splits)
  path = cli.open_task(
    config,
    folder,
    'images',
    f'{config.task}: {sizes} images, T={num_steps}, D={features}; {config.cell} '
    f'{config.hidden}',
    {'images_sha256': fingerprint},
    describe(config, sequences),
  )
  return path, cli.train_runs(config, path, functools.partial(train, sequences), plot)


def main(config: Config) -> None:
  """Trains and reports."""
  title = f'{config.task}, {config.cell} {config.hidden}'
  label = 'validation accuracy, %'
  plot = Plot('accuracy.png', title, 'valid_accuracy', label, (('step', 'epoch'),))
  cli.run_task(config, run, cli.Report(plot, 'valid_accuracy', digits=2, best=max))


if __name__ == '__main__':
  flags.run(main, Config)
