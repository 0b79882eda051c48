"""Exported steps run where only JAX is installed, and refuse what they cannot run."""

from collections.abc import Callable
import json
from pathlib import Path
import subprocess
import sys
from typing import Any, NamedTuple

import chex
from flax import nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import losses, nn

pytest.importorskip('flatbuffers', reason='flatbuffers is not installed.')

ALONE = """
import sys
for name in ('fptt_jax', 'flax', 'optax'):
  sys.modules[name] = None  # Importing it raises an ImportError.
import json, pathlib
import jax, numpy as np
from jax import export
root = pathlib.Path(sys.argv[1])
steps = {}
for folder in sorted(path.parent for path in root.glob('*/manifest.json')):
  manifest = json.loads((folder / 'manifest.json').read_text())
  program = (folder / 'step.bin').read_bytes()
  exported = export.deserialize(bytearray(program))
  donated = range(manifest['donated'])
  steps[folder.name] = jax.jit(exported.call, donate_argnums=donated)
with np.load(folder / 'state.npz') as arrays:
  state = [arrays[leaf['path']].view(leaf['dtype']) for leaf in manifest['state']]
with np.load(root / 'data.npz') as data:
  for place, name in enumerate(json.loads((root / 'calls.json').read_text())):
    outputs = steps[name](*state, data[f'x{place}'], data[f'y{place}'])
    state = outputs[:len(state)]
bits = [np.atleast_1d(array).view(np.uint8) for array in outputs]
np.savez(root / 'end.npz', *bits)
"""


class Case(NamedTuple):
  """Steps that are exported with a common state, and ten calls of them.

  Attributes:
    steps: name -> (the step, its example arguments).
    state: The first state.
    calls: (name, x, y) of each call.
  """

  steps: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]
  state: Any
  calls: list[tuple[str, np.ndarray, np.ndarray]]


def trainer_case() -> Case:
  """A trainer in bfloat16."""
  trainer = make_trainer(jnp.bfloat16)
  made = batches(10)
  state = trainer.init(jax.random.key(3), made[0])
  step = lambda state, x, y: trainer.step(state, fptt_jax.Batch(x, y))
  arguments = (made[0].inputs, made[0].targets)
  calls = [('batch', batch.inputs, batch.targets) for batch in made]
  return Case({'batch': (step, arguments)}, state, calls)


def learner_case() -> Case:
  """A learner of a stream, by single steps and by chunks that cut its windows."""
  learner = fptt_jax.make_learner(
    helpers.elman(),
    losses.sequence_regression(),
    fptt_jax.fptt(optax.adam(1e-2), alpha=0.3),
    window_size=2,
    delay=1,
  )
  x, y = helpers.series_batch(22, 1)[:2]
  state = learner.init(jax.random.key(0), x)
  steps = {name: (learner.step, (x[:size], y[:size])) for name, size in CHUNKS.items()}
  calls = []
  for start, name in [(0, 'chunk'), (5, 'single'), (6, 'chunk'), (11, 'chunk')]:
    stop = start + CHUNKS[name]
    calls.append((name, x[start:stop], y[start:stop]))
  calls += [('single', x[t : t + 1], y[t : t + 1]) for t in range(16, 22)]
  return Case(steps, state, calls)


CHUNKS = {'single': 1, 'chunk': 5}
"""Steps of the learner's two programs."""


def make_trainer(dtype: Any = jnp.float32) -> fptt_jax.Trainer:
  """A stack with dropout and a clipped `fptt` of Adam.

  Its layer runs here as in exported programs, which never hold a native kernel.
  """

  def stack(rngs: nnx.Rngs) -> nn.Sequential:
    return nn.Sequential(
      nn.LSTM(2, 4, param_dtype=dtype, implementation='custom_vjp', rngs=rngs),
      nn.LockedDropout(0.2),
      nnx.Linear(4, 1, param_dtype=dtype, rngs=rngs),
    )

  optimizer = fptt_jax.fptt(
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), alpha=0.2
  )
  return fptt_jax.make_trainer(
    nn.from_nnx(stack), losses.terminal_regression(), optimizer, num_windows=3
  )


def numbered_arguments(calls: list[tuple[str, Any, Any]]) -> dict[str, np.ndarray]:
  """Return the arguments of all calls by name."""
  named = {}
  for place, (_, x, y) in enumerate(calls):
    named |= {f'x{place}': x, f'y{place}': y}
  return named


def batches(number: int) -> list[fptt_jax.Batch]:
  rng = np.random.default_rng(0)
  return [
    fptt_jax.Batch(
      rng.normal(size=(9, 3, 2)).astype(np.float32),
      rng.normal(size=(3,)).astype(np.float32),
    )
    for _ in range(number)
  ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """A folder with an exported step that is quick to make."""
  step = lambda state, x: ({'w': state['w'] + x.sum()}, state['w'])
  state, x = {'w': jnp.zeros(2, jnp.float32)}, jnp.ones(3, jnp.float32)
  fptt_jax.export_step(step, state, x).save(tmp_path)
  return tmp_path


@pytest.mark.parametrize(
  'make_case', [trainer_case, learner_case], ids=['trainer', 'learner']
)
def test_ten_calls_without_this_library_are_the_same(
  make_case: Callable[[], Case], tmp_path: Path
) -> None:
  """Bit for bit, in a process that cannot import fptt_jax, flax or optax."""
  steps, state, calls = make_case()
  for name, (step, arguments) in steps.items():
    exported = fptt_jax.export_step(step, state, *arguments, platforms=['cpu'])
    exported.save(tmp_path / name)
    # What the manifest calls donated is so in the program.
    assert exported.stablehlo.count('tf.aliasing_output') > 0
    assert exported.manifest['donated'] == len(exported.manifest['state'])
  np.savez(tmp_path / 'data.npz', **numbered_arguments(calls))
  names = [name for name, _, _ in calls]
  (tmp_path / 'calls.json').write_text(json.dumps(names))
  subprocess.run([sys.executable, '-c', ALONE, str(tmp_path)], check=True)
  jitted = {name: jax.jit(step) for name, (step, _) in steps.items()}
  for name, x, y in calls:
    state, *results = jitted[name](state, x, y)
  leaves = jax.tree.leaves((state, results))
  expected = [
    jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    else leaf
    for leaf in leaves
  ]
  with np.load(tmp_path / 'end.npz') as arrays:
    found = [arrays[name] for name in arrays.files]
  assert len(names) == 10
  assert len(found) == len(expected)
  for bits, array in zip(found, expected, strict=True):
    np.testing.assert_array_equal(bits, np.atleast_1d(array).view(np.uint8))


def test_a_loaded_step_is_the_trainers(tmp_path: Path) -> None:
  """Results come by path, and one file serves two platforms."""
  trainer = make_trainer()
  state = trainer.init(jax.random.key(3), batches(1)[0])
  exported = fptt_jax.export_step(trainer.step, state, batches(1)[0])
  exported.save(tmp_path)
  assert exported.manifest['platforms'] == ['cpu', 'cuda']
  assert exported.manifest['donated'] == len(jax.tree.leaves(state))
  loaded = fptt_jax.load_exported_step(tmp_path)
  arrays = loaded.state
  for batch in batches(2):
    arrays, results = loaded.step(arrays, batch.inputs, batch.targets)
    state, metrics = trainer.step(state, batch)
  np.testing.assert_allclose(results['loss'], metrics.loss, rtol=1e-6)
  np.testing.assert_allclose(results['totals/loss'], metrics.totals['loss'], rtol=1e-6)
  restored = fptt_jax.state_from_arrays(
    state, dict(zip(fptt_jax.state_to_arrays(state), arrays, strict=True))
  )
  chex.assert_trees_all_close(restored.params, state.params, rtol=1e-5)


def test_donation_is_optional(tmp_path: Path) -> None:
  """A step that does not donate leaves the old state alive."""
  step = lambda state, x: (state + x, x.sum())
  for donate in (True, False):
    fptt_jax.export_step(step, jnp.zeros(3), jnp.ones(3), donate=donate).save(tmp_path)
    loaded = fptt_jax.load_exported_step(tmp_path)
    loaded.step(loaded.state, jnp.ones(3))
    assert loaded.state[0].is_deleted() is donate


@pytest.mark.parametrize('name', ['step.bin', 'step.mlir', 'state.npz'])
def test_a_changed_file_is_refused(name: str, folder: Path) -> None:
  data = bytearray((folder / name).read_bytes())
  data[len(data) // 2] ^= 1
  (folder / name).write_bytes(data)
  with pytest.raises(ValueError, match=rf'{name} .*Export the step again'):
    fptt_jax.load_exported_step(folder)


@pytest.mark.parametrize('name', ['step.bin', 'manifest.json'])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
  (folder / name).unlink()
  with pytest.raises(FileNotFoundError, match=name):
    fptt_jax.load_exported_step(folder)


def test_a_key_may_be_abstract_and_a_leaf_may_be_called_file(tmp_path: Path) -> None:
  """A PRNG key among the arguments as its shape, and a name that NumPy uses."""

  def step(state: Any, key: jax.Array) -> Any:
    return {'file': state['file'] + jax.random.normal(key)}, state['file']

  key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
  state = {'file': jnp.float32(2.0)}
  fptt_jax.export_step(step, state, key, platforms=['cpu']).save(tmp_path)
  loaded = fptt_jax.load_exported_step(tmp_path)
  [first] = loaded.state
  assert first == 2.0
  [new], _ = loaded.step(loaded.state, jax.random.key_data(jax.random.key(1)))
  assert new == 2.0 + jax.random.normal(jax.random.key(1))


@pytest.mark.parametrize('platforms', ['cpu', ('cpu', 'gpu'), []])
def test_unknown_platforms_are_refused(platforms: Any) -> None:
  with pytest.raises(ValueError, match=r'platforms must be one or more out of .* got'):
    fptt_jax.export_step(lambda s: (s, s), jnp.ones(1), platforms=platforms)


def test_platforms_may_come_from_a_generator() -> None:
  """Each is named once."""
  names = (name for name in ('cpu', 'cpu', 'tpu'))
  exported = fptt_jax.export_step(lambda s: (s, s), jnp.ones(1), platforms=names)
  assert exported.manifest['platforms'] == ['cpu', 'tpu']


def test_a_text_is_no_flag() -> None:
  with pytest.raises(TypeError, match="donate must be True or False, got 'False'"):
    fptt_jax.export_step(lambda s: (s, s), jnp.ones(1), donate='False')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'format': 2}, 'format 1, got 2'),
    ({'calling_convention_version': 3}, 'calling convention .* got 3'),
    ({'calling_convention_version': 99}, 'calling convention .* got 99'),
    ({'platforms': ['tpu']}, r"platform cpu, got \['tpu'\]"),
  ],
)
def test_a_foreign_or_expired_step_is_refused(
  changes: dict[str, Any], message: str, folder: Path
) -> None:
  """With what it needs and what to do."""
  path = folder / 'manifest.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(ValueError, match=rf'the step in .*{message}.*Export'):
    fptt_jax.load_exported_step(folder)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([np.ones(4, np.float32)], r"arguments\[0\] .'0'. must be float32\[3\], .*\[4\]"),
    ([np.ones(3, np.int32)], r"arguments\[0\] .'0'. must be float32\[3\].*int32\[3\]"),
    ([], 'arguments must be 1 arrays.*got 0'),
    ([[1.0, 2.0, 3.0]], r'arguments\[0\] must be an array, got list'),
  ],
  ids=str,
)
def test_other_arguments_are_refused_and_the_state_is_intact(
  arguments: list[Any], message: str, folder: Path
) -> None:
  loaded = fptt_jax.load_exported_step(folder)
  with pytest.raises((ValueError, TypeError), match=message):
    loaded.step(loaded.state, *arguments)
  state, _ = loaded.step(loaded.state, np.ones(3, np.float32))
  np.testing.assert_array_equal(state[0], [3, 3])
  with pytest.raises(ValueError, match=r'state must be 1 arrays.*got 2'):
    loaded.step([*state, *state], np.ones(3, np.float32))


@pytest.mark.parametrize(
  ('step', 'message'),
  [
    (lambda state, x: state, r'step must be \(new state, results\), got'),
    (lambda state, x: ({'v': x}, x), "step .*missing 'w'"),
    (lambda state, x: ({'w': x.astype(jnp.bfloat16)}, x), r'step.*w.*float32\[3\]'),
    (lambda state, x: ({'w': x[:2]}, x), r'step.*w.*float32\[3\].*got float32\[2\]'),
  ],
)
def test_steps_of_another_form_are_refused(step: Any, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    fptt_jax.export_step(
      step, {'w': jnp.zeros(3, jnp.float32)}, jnp.ones(3, jnp.float32)
    )


def test_two_leaves_of_one_path_are_refused() -> None:
  """One would be lost in the file of the state or in the dict of the results."""
  twice = {'a/b': jnp.zeros(2), 'a': {'b': jnp.ones(2)}}
  for state, results in (({}, twice), (twice, {})):
    with pytest.raises(ValueError, match=r"must be different, got \['a/b'\]"):
      fptt_jax.export_step(lambda state, r=results: (state, r), state)


def test_arguments_that_are_not_arrays_are_refused() -> None:
  step = lambda state, x: (state, x)
  with pytest.raises(TypeError, match=r'args\[0\] must be an array, got str'):
    fptt_jax.export_step(step, jnp.zeros(3), 'x')
  with pytest.raises(TypeError, match=r"state\['w'\] must be an array, got int"):
    fptt_jax.export_step(step, {'w': 1}, jnp.zeros(3))
  with pytest.raises(TypeError, match=r'^step must be a function'):
    fptt_jax.export_step({'step': step}, jnp.zeros(3), jnp.zeros(3))


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, 'flatbuffers', None)
  with pytest.raises(ImportError, match=r'flatbuffers.*pip install flatbuffers'):
    fptt_jax.export_step(lambda state, x: (state, x), jnp.zeros(3), jnp.zeros(3))


@pytest.mark.parametrize('dtype', ['float64', 'int64'])
def test_numpys_64_bits_are_written_in_jaxs_width(dtype: str, tmp_path: Path) -> None:
  """Results that are Python numbers are arrays, too."""

  def step(state, x):
    new = jax.tree.map(lambda leaf: (leaf + x.sum()).astype(leaf.dtype), state)
    return new, {'constant': 1.5}

  state = {'a': np.arange(3, dtype=dtype)}
  exported = fptt_jax.export_step(step, state, np.ones(2), platforms=('cpu',))
  exported.save(tmp_path)
  loaded = fptt_jax.load_exported_step(tmp_path)
  assert loaded.state[0].shape == (3,)
  new, results = loaded.step(loaded.state, np.ones(2, np.float32))
  np.testing.assert_array_equal(new[0], [2, 3, 4])
  assert [float(leaf) for leaf in results.values()] == [1.5]


def test_a_step_on_several_devices_is_refused() -> None:
  """Its program could not be called from a program on one device."""
  devices = np.asarray(jax.devices()[:2])
  trainer = fptt_jax.make_trainer(
    helpers.elman(),
    fptt_jax.losses.terminal_regression(),
    optax.sgd(0.1),
    method='tbptt',
    num_windows=2,
    mesh=jax.sharding.Mesh(devices, ('batch',)),
  )
  batch = helpers.regression_batch(4, 4)
  state = trainer.init(jax.random.key(0), batch)
  with pytest.raises(ValueError, match='step must be one that runs on one device'):
    fptt_jax.export_step(trainer.step, state, batch)
