"""Training runs whose every bit is recorded, as a safety net for refactoring.

Each case trains three steps and evaluates. `python -m tests.golden` records what
comes out; `tests/test_golden.py` compares.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import inspect
from pathlib import Path
import platform
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fptt_jax
from fptt_jax import losses, nn

FOLDER = Path(__file__).parent
NUM_STEPS, BATCH_SIZE, CLASSES, STEPS = 13, 8, 3, 3
LENGTHS = np.array([13, 3, 7, 1, 12, 9, 4, 13], np.int32)
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all')


@dataclasses.dataclass(frozen=True)
class Case:
  """One recorded run.

  Attributes:
    layer: (in_features, dtype, rngs) -> recurrent layer with 6 outputs.
    loss: name in `LOSSES`.
    method: training method.
    devices: devices that the batch is split over; 1 for no mesh.
    ragged: whether sequences have the lengths `LENGTHS`.
    members: size of the population; 0 for a run by itself.
    scanned: whether the steps are one program.
    fptt: keyword arguments of `fptt`.
    options: keyword arguments of the trainer.
  """

  layer: Callable[[int, Any, nnx.Rngs], nnx.Module]
  loss: str = 'regression'
  method: str = 'fptt'
  devices: int = 1
  ragged: bool = False
  members: int = 0
  scanned: bool = False
  fptt: dict[str, Any] = dataclasses.field(default_factory=dict)
  options: dict[str, Any] = dataclasses.field(
    default_factory=lambda: {'num_windows': 4}
  )


def layer_of(kind: type[nnx.Module], **settings: Any) -> Callable[..., nnx.Module]:
  """Returns (in_features, dtype, rngs) -> a layer of `kind` with 6 units.

  Layers with several implementations run as JAX's own scans unless `settings` say
  otherwise, so that the records do not depend on a C++ compiler.
  """
  if 'implementation' in inspect.signature(kind.__init__).parameters:
    settings = {'implementation': 'custom_vjp', **settings}
  return lambda features, dtype, rngs: kind(
    features, 6, param_dtype=dtype, rngs=rngs, **settings
  )


LOSSES = {
  'regression': losses.terminal_regression(),
  'class_ema': losses.terminal_classification(CLASSES, ema_decay=0.5),
  'last_epoch': losses.terminal_classification(CLASSES, divergence='last_epoch'),
  'tagging': losses.sequence_classification(CLASSES, accuracy=True),
  'series': losses.sequence_regression(),
}

CASES = {
  'fptt-lstm-ragged': Case(layer_of(nn.LSTM), 'class_ema', ragged=True),
  'fptt-gru-mesh': Case(layer_of(nn.GRU), 'last_epoch', devices=2),
  'tbptt-rnn-carried': Case(
    layer_of(nn.ElmanRNN),
    'tagging',
    'tbptt',
    options={'num_windows': 4, 'carry_hidden': True},
  ),
  'bptt-antisymmetric': Case(layer_of(nn.AntisymmetricRNN), method='bptt', options={}),
  'bptt_aux-lstm': Case(layer_of(nn.LSTM), 'series', 'bptt_aux'),
  'tbptt_final-gru': Case(
    layer_of(nn.GRU), method='tbptt_final', options={'truncation_steps': 5}
  ),
  'ogd-indrnn': Case(layer_of(nn.IndRNN), 'series', 'ogd', options={}),
  'ftrl-lstm-ragged': Case(layer_of(nn.LSTM), 'series', 'ftrl', ragged=True),
  'fptt-lru-inner': Case(
    layer_of(nn.LRU),
    'tagging',
    options={'num_windows': 3, 'inner_steps': 2},
  ),
  'fptt-recomputed-sharded': Case(
    layer_of(nn.LSTM),
    devices=4,
    ragged=True,
    fptt={'gradient_estimate': 'recomputed'},
    options={'num_windows': 4, 'shard_params': True},
  ),
  'fptt-fastgrnn-skip': Case(
    layer_of(nn.FastGRNN), options={'num_windows': 4, 'skip_nonfinite': True}
  ),
  'fptt-lstm-members': Case(layer_of(nn.LSTM), 'class_ema', members=3),
  'fptt-irnn-mesh-ragged': Case(
    layer_of(nn.IncrementalRNN), 'class_ema', devices=2, ragged=True
  ),
  'tbptt-lstm-chunked-scanned': Case(
    layer_of(nn.LSTM),
    'tagging',
    'tbptt',
    scanned=True,
    options={'num_windows': 3, 'readout_chunk': 2},
  ),
  'fptt-lstm-scan-lagged': Case(
    layer_of(nn.LSTM, implementation='scan'),
    fptt={'gradient_estimate': 'lagged', 'linear_scale': 0.5, 'kappa': 2.0},
  ),
}


def make_batch(case: Case, dtype: Any) -> fptt_jax.Batch:
  """Draws the case's batch with NumPy."""
  rng = np.random.default_rng(7)
  inputs = rng.normal(size=(NUM_STEPS, BATCH_SIZE, 2)).astype(dtype)
  labels = rng.integers(0, CLASSES, (NUM_STEPS, BATCH_SIZE)).astype(np.int32)
  reals = rng.normal(size=(NUM_STEPS, BATCH_SIZE, 1)).astype(dtype)
  targets = {
    'regression': reals[0, :, 0],
    'class_ema': labels[0],
    'last_epoch': labels[0],
    'tagging': labels,
    'series': reals,
  }[case.loss]
  return fptt_jax.Batch(inputs, targets, LENGTHS if case.ragged else None)


def make_trainer(case: Case, dtype: Any, traced: list[int]) -> fptt_jax.Trainer:
  """Makes the case's trainer; `traced` gets an entry for each trace of the model."""
  outputs = CLASSES if case.loss in ('class_ema', 'last_epoch', 'tagging') else 1
  model = nn.from_nnx(
    lambda rngs: nn.Sequential(
      case.layer(2, dtype, rngs),
      nnx.Dropout(0.25),
      nnx.Linear(6, outputs, param_dtype=dtype, rngs=rngs),
    )
  )

  def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
      traced.append(1)
      return function(*args)

    return call

  model = model._replace(
    apply=counted(model.apply), apply_last=counted(model.apply_last), original=None
  )
  base = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.02))
  if case.method == 'fptt':
    base = fptt_jax.fptt(base, alpha=0.3, **case.fptt)
  mesh = None
  if case.devices > 1:
    mesh = jax.sharding.Mesh(jax.devices('cpu')[: case.devices], ('batch',))
  loss = LOSSES[case.loss]
  options = dict(method=case.method, mesh=mesh, **case.options)
  trainer = fptt_jax.make_trainer(model, loss, base, **options)
  return fptt_jax.vmap_trainer(trainer) if case.members else trainer


def run(case: Case, dtype: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
  """Trains and evaluates: (what is recorded, the arrays it is of)."""
  traced: list[int] = []
  trainer = make_trainer(case, dtype, traced)
  batch = make_batch(case, dtype)
  key = jax.random.key(0)
  keys = jax.random.split(key, case.members) if case.members else key
  state = trainer.init(keys, batch)
  traced.clear()
  compiled = trainer.step.lower(state, batch).compile()
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  if case.scanned:
    batches = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * STEPS), batch)
    state, metrics = fptt_jax.scan_train_steps(trainer)(state, (), batches)
    seen = [metrics]
  else:
    seen = []
    for _ in range(STEPS):
      state, metrics = compiled(state, batch)
      seen.append(metrics)
  evaluated = trainer.evaluate(state.params, batch)
  state = state._replace(key=jax.random.key_data(state.key))
  # Kept apart, so that the digests of older records still hold.
  invalid = [metrics.invalid for metrics in seen]
  assert not np.any(invalid)
  seen = [metrics._replace(invalid=None) for metrics in seen]
  leaves = jax.tree.leaves((state, seen, evaluated))
  arrays = [np.asarray(leaf) for leaf in leaves]
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(np.ascontiguousarray(array))
  record = {
    'digest': digest.hexdigest(),
    'traces': len(traced),
    'temp_bytes': memory.temp_size_in_bytes,
    'collectives': {
      name: len(re.findall(rf'= \S+ {name}(?:-start)?\(', text)) for name in COLLECTIVES
    },
  }
  return record, [array.ravel() for array in arrays]


def machine() -> dict[str, str]:
  """Returns what decides how a program rounds."""
  cpu = platform.processor()
  info = Path('/proc/cpuinfo')
  if info.exists():
    lines = info.read_text().splitlines()
    flags = next((line for line in lines if line.startswith('flags')), '')
    wide = sorted(flag for flag in flags.split() if flag.startswith(('avx', 'fma')))
    names = [line for line in lines if line.startswith('model name')]
    cpu = f'{names[0].partition(":")[2].strip() if names else ""} {" ".join(wide)}'
  return {'cpu': cpu, 'jaxlib': jax.lib.__version__}
