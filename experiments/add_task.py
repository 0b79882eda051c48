"""The adding problem (Hochreiter & Schmidhuber 1997): FPTT against its rivals, as in Figs. 1-3 of the paper.

A sequence has two rows: numbers uniform in [0, 1], and two markers, one in each half. The target is the sum of the two marked
numbers; always answering 1 gives a mean squared error of 1/6 = 0.167. Every batch is drawn afresh.

The defaults run on two CPU cores in about seven minutes: T=120, an LSTM of 128, batch 128, K=11. The paper's settings are
--seq_len=200|500|750|1000 --nodecay.
"""

from collections.abc import Callable, Iterable
import dataclasses
import math
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments import cells, options, processes, recipe, runs
from experiments.members import Member, Population, chunks, end, remaining, train_all
from experiments.options import check, option
import fptt_jax
from fptt_jax import nn

CHANCE = 1 / 6


@dataclasses.dataclass(frozen=True)
class Config(recipe.Recipe):
  """Settings of the adding problem."""

  method: tuple[str, ...] = option(('fptt', 'tbptt', 'bptt'), f'methods, one after the other: {", ".join(recipe.METHODS)}')
  alpha: float = option(0.1, 'strength of the tie of W to its summary')
  clip: float = option(1.0, 'largest global norm of the gradient; 0 does not clip')
  seq_len: int = option(120, 'T, steps of a sequence')
  hidden: int = option(128, 'H, LSTM units')
  batch_size: int = option(128, 'B, fresh sequences a batch')
  batches: int = option(3000, 'training batches; each gives K updates, or one')
  forget_bias: float = option(1.0, "initial bias of the LSTM's forget gate")
  decay: bool = option(True, 'decay the learning rate to 0 over the run along a half cosine (False: constant, as in the paper)')
  test_size: int = option(1024, 'sequences of the test set, drawn independently')
  eval_every: int = option(100, 'batches between evaluations, which are also checkpoints')
  workdir: str = option('', 'folder of the run; default runs/add_task-TIME. The same command and folder resume a run')

  def __post_init__(self) -> None:
    super().__post_init__()
    check(math.isfinite(self.forget_bias), 'forget_bias', self.forget_bias, 'a finite number')
    for name in ('hidden', 'batch_size', 'batches', 'test_size', 'eval_every'):
      check(getattr(self, name) >= 1, name, getattr(self, name), 'at least 1')
    check(self.seq_len >= 2, 'seq_len', self.seq_len, 'at least 2 (a marker in each half)')
    self.check_length(self.seq_len)


def draw_batch(key: jax.Array, seq_len: int, batch_size: int) -> fptt_jax.Batch:
  """Draws inputs [T, B, 2] (value, marker) and targets [B]; one marker in each half of the sequence."""
  value_key, first_key, second_key = jax.random.split(key, 3)
  values = jax.random.uniform(value_key, (seq_len, batch_size), jnp.float32)
  first = jax.random.randint(first_key, (batch_size,), 0, seq_len // 2)
  second = jax.random.randint(second_key, (batch_size,), seq_len // 2, seq_len)
  steps = jnp.arange(seq_len)[:, None]
  markers = ((steps == first[None]) | (steps == second[None])).astype(values.dtype)
  return fptt_jax.Batch(jnp.stack([values, markers], axis=-1), jnp.sum(values * markers, axis=0))


@jax.jit
def _batch_keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
  return jax.random.key_data(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers))


def batch_keys(key: jax.Array, numbers: np.ndarray) -> np.ndarray:
  """Data of each batch's own key, uint32 [N, 2]."""
  return np.asarray(_batch_keys(key, numbers))


def make_model(config: Config) -> fptt_jax.Model:
  """One LSTM and a linear readout."""
  return nn.from_nnx(
    lambda rngs: nn.Stack(
      nn.LSTM(2, config.hidden, forget_bias=config.forget_bias, rngs=rngs), nnx.Linear(config.hidden, 1, rngs=rngs)
    )
  )


def model_of(config: Config, data: dict[str, Any]) -> fptt_jax.Model:
  """Make the model of a folder; its data are drawn, and need no description."""
  return make_model(config)


def make_trainer(config: Config, method: str, members: int) -> tuple[fptt_jax.Trainer, recipe.Meshes]:
  """The trainer of one run, and devices for so many."""
  _, updates = recipe.updates_a_sequence(config, method, config.seq_len)
  decay = optax.cosine_decay_schedule(1.0, config.batches * updates) if config.decay else None
  loss, steps = fptt_jax.losses.terminal_regression(), recipe.window_steps(config, method, config.seq_len)
  meshes = recipe.choose_meshes(config, config.batch_size, config.hidden, steps, members)
  return recipe.make_trainer(config, method, make_model(config), loss, config.seq_len, decay=decay, mesh=meshes.batch), meshes


def train(chosen: list[Member], folder: Path) -> None:
  """Trains runs of one method side by side, and keeps what came of each."""
  config, method = chosen[0].config, chosen[0].method
  num_windows, updates = recipe.updates_a_sequence(config, method, config.seq_len)
  trainer, meshes = make_trainer(config, method, len(chosen))
  keys = [jax.random.split(jax.random.key(member.seed), 3) for member in chosen]
  draw = jax.jit(draw_batch, static_argnums=(1, 2))
  tests = [processes.alike(draw(test_key, config.seq_len, config.test_size)) for _, _, test_key in keys]
  read = lambda _, data: draw_batch(jax.random.wrap_key_data(data), config.seq_len, config.batch_size)

  group = Population(trainer, read, (), chosen, folder, meshes)
  first, (state, _), saved = group.start(
    [init_key for init_key, _, _ in keys], [batch_keys(data_key, np.zeros(1, int))[0] for _, data_key, _ in keys]
  )
  going, skipped = list(range(len(group.runs))), [record.get('skipped', 0) for record in saved]

  def save(step: int, state: fptt_jax.TrainState) -> None:
    group.save(step, (state, ()), {number: {'skipped': skipped[number]} for number in going})

  with tqdm(total=config.batches, initial=first, desc=method, unit='batch', disable=None) as bar:
    for start in range(0, config.batches, config.eval_every):
      numbers = np.arange(start, min(start + config.eval_every, config.batches)) + 1
      if numbers[-1] <= first:
        continue
      items = lambda part, numbers=numbers: [batch_keys(data_key, numbers[part]) for _, data_key, _ in keys]
      parts = remaining(chunks(len(numbers), config.chunk), first - start)
      state, metrics, step = train_interval(group, state, start, parts, items, going, skipped, save, bar)
      params = group.unstack(recipe.evaluation_params(config, method, state))
      for number in going:
        totals, _ = trainer.evaluate(params[number], tests[number])
        row = log(group, number, step, step * updates - skipped[number], skipped[number], metrics, fptt_jax.means(totals)['loss'])
        bar.write(line(chosen[number], row, group.lost.get(number)))
      going = [number for number in going if number not in group.lost and None not in group.runs[number].rows[-1].values()]
      if not going:
        break
      save(step, state)
  group.close()
  params = group.unstack(recipe.evaluation_params(config, method, state))
  for number, (member, run) in enumerate(zip(chosen, group.runs, strict=False)):
    lost = {'lost': group.lost[number]} if number in group.lost else {}
    end(folder, member, summarise(num_windows, run.rows) | sizes(config) | lost, None if lost else params[number])


def train_interval(
  group: Population,
  state: fptt_jax.TrainState,
  start: int,
  parts: Iterable[np.ndarray],
  items: Callable[[np.ndarray], list[Any]],
  going: list[int],
  skipped: list[int],
  save: Callable[[int, fptt_jax.TrainState], None],
  bar: tqdm,
) -> tuple[fptt_jax.TrainState, fptt_jax.StepMetrics, int]:
  """Trains on the batches after `start` that are in `parts`, a program each: state, metrics of the last part, the last batch's
  number. What is skipped is added up."""
  seen: list[tuple[fptt_jax.StepMetrics, int]] = []

  def settle() -> None:
    """Looks at what has run."""
    for metrics, batches in seen:
      group.look(metrics, batches)
      for number in going:
        skipped[number] += int(np.sum(metrics.skipped[:, number])) * group.members[number].config.inner_steps
    seen.clear()

  for part in parts:
    if seen and group.due():
      settle()
      save(start + int(part[0]), state)
    state, metrics = group.steps(state, items(part))
    settle()  # One chunk ahead, no more: the bar tells the truth.
    seen.append((metrics, start + int(part[0])))
    bar.update(len(part))
    if group.all_lost(going):
      break
  settle()
  return state, metrics, start + int(part[-1]) + 1


def log(
  group: Population, number: int, step: int, updates: int, skipped: int, metrics: fptt_jax.StepMetrics, test_mse: float
) -> dict[str, Any]:
  """Writes down an evaluation of one run, with means over the last batch's updates, those that were made: the row."""
  made = ~np.asarray(metrics.skipped[-1, number])
  mean = lambda values: float(np.where(made, values[-1, number], 0).sum() / max(1, made.sum()))
  return group.runs[number].log(
    step,
    updates=updates,
    train_loss=mean(metrics.loss),
    grad_norm=mean(metrics.grad_norm),
    **({'skipped': skipped} if group.members[number].config.nonfinite == 'skip' else {}),
    test_mse=test_mse,
  )


def line(member: Member, row: dict[str, Any], lost: str | None) -> str:
  """What is shown of a run at an evaluation."""
  start = f'{member.label}  batch {row["step"]:>6}  '
  if lost is not None or None in row.values():
    return start + f'diverged: {lost or "the test MSE is not finite"}'
  skipped = f'skipped {row["skipped"]}  ' if row.get('skipped') else ''
  return (
    f'{start}updates {row["updates"]:>8}  train loss {row["train_loss"]:.4f}  test MSE {row["test_mse"]:.4f}  '
    f'{skipped}{row["seconds"]:.0f} s'
  )


def summarise(num_windows: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
  """What a run came to, from its metrics."""
  errors = [(row['test_mse'], row['step']) for row in rows if row['test_mse'] is not None]
  solved = [step for error, step in errors if error < 0.01]
  return {
    'K': num_windows,
    'batches': rows[-1]['step'],
    'updates': rows[-1]['updates'],
    'test_mse': rows[-1]['test_mse'],
    'best_mse': min(errors)[0] if errors else None,
    'below_0.01_at': solved[0] if solved else None,
    'seconds': rows[-1]['seconds'],
  }


def sizes(config: Config) -> dict[str, int]:
  """Numbers of parameters: all, and the LSTM's."""
  params = jax.eval_shape(make_model(config).init, jax.random.key(0))
  return {'parameters': cells.count(params), 'recurrent_parameters': cells.recurrent_parameters('lstm', (2, config.hidden))}


def run(config: Config, folder: str) -> tuple[Path, list[dict[str, Any]]]:
  """Trains by each method from each seed: (the folder, a summary each)."""
  path = runs.open_workdir(folder, 'add_task', config)
  print(f'adding problem, T={config.seq_len}, LSTM {config.hidden}, batch {config.batch_size}; writing to {path}')
  size = recipe.population_size(config, config.batch_size, config.hidden)
  return path, train_all(config, path, size, lambda chosen: train(chosen, path))


def main(config: Config) -> None:
  """Trains and reports."""
  processes.join(config.coordinator, config.num_processes, config.process_id)
  folder, summaries = run(config, config.workdir)
  marks = {'chance': CHANCE, 'solved': 0.01}
  runs.report(folder, summaries, 'test_mse', 'convergence.png', 'batches', 'test MSE', marks, digits=4)
  print(f'chance {CHANCE:.3f} (answering 1); test MSE is the one after the last batch')


if __name__ == '__main__':
  options.run(main, Config)
