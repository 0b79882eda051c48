"""Language modelling: an LSTM on Penn Treebank words, trained forward through time (paper, Sec. 4.3 and Table 4).

The text is read as B streams side by side; each sequence of T words continues the one before, hidden state carried on. Perplexity
is measured on the validation text after each epoch, and once, at the best epoch's weights, on the test text.

--task=ptb300 is the setting of the authors' release for PTB-300: T=300 in K=6 windows, one LSTM of 256 units, SGD with momentum
0.9, learning rate 2 divided by 4 whenever validation does not improve, alpha 0.5, kappa 2.
"""

from collections.abc import Iterator
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

from experiments import options, ptb, recipe, runs
from experiments.options import UserError, check, option
import fptt_jax
from fptt_jax import nn

EVALUATION_STEPS = 4096


@dataclasses.dataclass(frozen=True)
class Config(recipe.Recipe):
  """Settings of a language model."""

  task: str = option('ptb300', "'ptb300': the original Penn Treebank; 'text': any three files named like it", ('ptb300', 'text'))
  data_dir: str = option('', 'folder with ptb.train.txt, ptb.valid.txt, ptb.test.txt (or .gz), or one .npz of experiments.ptb')
  num_windows: int | None = option(6, 'K, updates a sequence, for methods that do not fix it')
  kappa: float = option(2.0, 'scale of the quadratic term')
  optimizer: str = option('sgd', 'base optimiser', ('adam', 'sgd'))
  lr: float = option(2.0, 'learning rate')
  momentum: float = option(0.9, "heavy-ball momentum of 'sgd'")
  plateau_factor: float = option(4.0, 'divides the learning rate after an epoch without a better validation perplexity')
  restart: bool = option(False, 'restart the recursion at each epoch: W := its summary, lambda := 0 (fptt only)')
  seq_len: int = option(300, 'T, words of a sequence')
  batch_size: int = option(128, 'B, parallel streams of training text')
  embedding: int = option(256, 'size of the word vectors')
  hidden: int = option(256, 'H, LSTM units')
  dropout: float = option(0.2, 'on word vectors and LSTM outputs')
  epochs: int = option(25, 'passes over the training text')
  min_lr: float = option(1e-3, 'stop when the learning rate has fallen below this')
  workdir: str = option('', 'folder of the run; default runs/language_model-TIME. The same command and folder resume a run')

  def __post_init__(self) -> None:
    super().__post_init__()
    check('tbptt_final' not in self.method, 'method', self.method, 'without tbptt_final, which takes no padded last sequence')
    check(bool(self.data_dir), 'data_dir', self.data_dir, f'a folder with the text files ({ptb.SOURCE})')
    for name in ('seq_len', 'batch_size', 'embedding', 'hidden', 'epochs'):
      check(getattr(self, name) >= 1, name, getattr(self, name), 'at least 1')
    check(0 <= self.dropout < 1, 'dropout', self.dropout, 'in [0, 1)')
    check(self.plateau_factor >= 1, 'plateau_factor', self.plateau_factor, 'at least 1')
    self.check_length(self.seq_len)


def make_model(config: Config, vocabulary_size: int) -> fptt_jax.Model:
  """Embedding, one LSTM, a linear readout; dropout before and after the LSTM."""
  return nn.from_nnx(
    lambda rngs: nn.Stack(
      nnx.Embed(vocabulary_size, config.embedding, rngs=rngs),
      nnx.Dropout(config.dropout),
      nn.LSTM(config.embedding, config.hidden, rngs=rngs),
      nnx.Dropout(config.dropout),
      nnx.Linear(config.hidden, vocabulary_size, rngs=rngs),
    )
  )


def sequences(tokens: np.ndarray, seq_len: int, batch_size: int) -> Iterator[fptt_jax.Batch]:
  """Cuts a text into B streams and these into batches of T steps, in order; the last batch is padded, its lengths say so."""
  stream = len(tokens) // batch_size
  if stream < 2:
    raise UserError(f'a text of {len(tokens)} tokens is too short for {batch_size} parallel streams.')
  streams = tokens[: stream * batch_size].reshape(batch_size, stream).T
  for start in range(0, stream - 1, seq_len):
    inputs, targets = streams[start : start + seq_len], streams[start + 1 : start + seq_len + 1]
    steps = len(targets)
    if steps == seq_len:
      yield fptt_jax.Batch(inputs, targets)
    else:
      padding = ((0, seq_len - steps), (0, 0))
      lengths = np.full(batch_size, steps, np.int32)
      yield fptt_jax.Batch(np.pad(inputs[:steps], padding), np.pad(targets, padding), lengths)


def active_updates(config: Config, method: str, batch: fptt_jax.Batch) -> int:
  """Updates the batch gives: K or one, fewer where a padded batch ends before the last windows."""
  num_windows, updates = recipe.updates_a_sequence(config, method, config.seq_len)
  if batch.lengths is None or updates == config.inner_steps:
    return updates // config.inner_steps
  return int((fptt_jax.cut(config.seq_len, num_windows=num_windows).starts < batch.lengths.max()).sum())


def perplexity(trainer: fptt_jax.Trainer, params: Any, tokens: np.ndarray) -> float:
  """Perplexity of a whole text read as one stream, hidden state carried from beginning to end."""
  hidden, sums = None, {'loss': 0.0, 'count': 0}
  for batch in sequences(tokens, EVALUATION_STEPS, 1):
    if hidden is None:
      totals, hidden = trainer.evaluate(params, batch)
    else:
      totals, hidden = trainer.evaluate(params, batch, hidden)
    sums = {name: sums[name] + totals[name].item() for name in sums}
  return to_perplexity(sums['loss'] / sums['count'])


def to_perplexity(nats: float) -> float:
  """exp of a mean cross-entropy; infinite where it overflows or is NaN."""
  return math.exp(nats) if nats < 700 else math.inf


def train_epoch(
  trainer: fptt_jax.Trainer, state: fptt_jax.TrainState, batches: list[fptt_jax.Batch], updates: list[int], bar: tqdm
) -> tuple[fptt_jax.TrainState, float, float]:
  """One pass over the text: (state, training loss in nats a word, mean gradient norm over the updates made)."""
  totals, norms = [], []
  for batch in batches:
    state, metrics = trainer.step(state, batch)
    totals.append(metrics.totals)
    norms.append(metrics.grad_norm)
    jax.block_until_ready(norms[-2:-1])  # One batch ahead, no more: the bar tells the truth.
    bar.update()
  loss = sum(t['loss'].item() for t in totals) / sum(t['count'].item() for t in totals)
  made = np.concatenate([norm[:count] for norm, count in zip(norms, updates, strict=True)])
  return trainer.end_epoch(state), loss, float(np.mean(made))


def train(config: Config, text: ptb.Text, method: str, seed: int, folder: Path) -> dict[str, Any]:
  """Trains by one method from one seed and returns its summary."""
  num_windows, _ = recipe.updates_a_sequence(config, method, config.seq_len)
  model = make_model(config, len(text.vocabulary))
  loss = fptt_jax.losses.sequence_classification(len(text.vocabulary))
  trainer = recipe.make_trainer(config, method, model, loss, config.lr, config.seq_len, carry_hidden=True)
  batches = list(sequences(text.train, config.seq_len, config.batch_size))
  updates = [active_updates(config, method, batch) for batch in batches]

  run = runs.Run(folder / f'{method}-seed{seed}')
  state = trainer.init(jax.random.key(seed), batches[0])
  best_params = jax.tree.map(jnp.copy, state.params)
  first, (state, best_params), record = run.restore((state, best_params))
  lr, best, best_epoch = record.get('lr', config.lr), record.get('best', math.inf), record.get('best_epoch', 0)

  with tqdm(total=config.epochs * len(batches), initial=first * len(batches), unit='batch', disable=None) as bar:
    bar.set_description(f'{method} seed {seed}')
    for epoch in range(first + 1, config.epochs + 1):
      if lr < config.min_lr:
        break
      state = state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=jnp.asarray(lr, jnp.float32)))
      state, train_loss, grad_norm = train_epoch(trainer, state, batches, updates, bar)
      if config.restart and fptt_jax.METHODS[method].regularised:
        params, opt_state = fptt_jax.fptt_restart(state.opt_state, state.params)
        state = state._replace(params=params, opt_state=opt_state)
      params = recipe.evaluation_params(config, method, state)
      valid = perplexity(trainer, params, text.valid)
      row = run.log(
        epoch,
        updates=epoch * sum(updates) * config.inner_steps,
        lr=lr,
        train_ppl=to_perplexity(train_loss),
        grad_norm=grad_norm,
        valid_ppl=valid,
      )
      if None in row.values():
        bar.write(f'{method:>11} seed {seed}  epoch {epoch:>3}  diverged: train or validation perplexity is not finite')
        break
      if valid < best:
        best, best_epoch, best_params = valid, epoch, jax.tree.map(jnp.copy, params)
      else:
        lr /= config.plateau_factor
      run.save(epoch, (state, best_params), lr=lr, best=best, best_epoch=best_epoch)
      bar.write(
        f'{method:>11} seed {seed}  epoch {epoch:>3}  lr {row["lr"]:<8.4g} train ppl {row["train_ppl"]:8.2f}  '
        f'valid ppl {valid:8.2f}  {row["seconds"]:.0f} s'
      )
  run.close()
  return {
    'method': method,
    'seed': seed,
    'K': num_windows,
    'epochs': run.rows[-1]['step'],
    'best_epoch': best_epoch,
    'valid_ppl': best if best_epoch else None,
    'test_ppl': perplexity(trainer, best_params, text.test) if best_epoch else None,
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(best_params)),
    'seconds': run.rows[-1]['seconds'],
  }


def main(config: Config) -> None:
  """Trains by each method from each seed."""
  text = ptb.load(Path(config.data_dir), check_hashes=config.task == 'ptb300')
  folder = runs.open_workdir(config.workdir, 'language_model', config, text_sha256=ptb.fingerprint(text))
  print(
    f'{config.task}: {len(text.train):,} / {len(text.valid):,} / {len(text.test):,} words, vocabulary {len(text.vocabulary):,}; '
    f'T={config.seq_len}, LSTM {config.hidden}, batch {config.batch_size}; writing to {folder}'
  )
  summaries = [train(config, text, method, seed, folder) for method in config.method for seed in config.seeds]
  runs.report(folder, summaries, 'valid_ppl', 'perplexity.png', 'epoch', 'validation perplexity', {}, digits=2)


if __name__ == '__main__':
  options.run(main, Config)
