"""Train steps as files that run where only JAX and flatbuffers are installed."""

from collections.abc import Callable, Mapping, Sequence
import datetime
import hashlib
import importlib.metadata
import io
import json
from pathlib import Path
from typing import Any, NamedTuple
import zipfile

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import Words, check_array, check_callable, check_flag, require
from fptt_jax._trees import check_like, distinct_paths, leaf_paths, shapes

FORMAT = 1
"""Version of the file format. It rises when the meaning of a manifest changes."""

PROGRAM, TEXT, STATE, MANIFEST = 'step.bin', 'step.mlir', 'state.npz', 'manifest.json'
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
AGAIN = 'Export the step again with the installed versions'


class ExportedStep(NamedTuple):
  """A train step and its first state as data, see :func:`export_step`.

  The program takes the leaves of the state, then those of the other arguments. It
  returns the leaves of the new state, then those of the results. Their order is the
  manifest's. PRNG keys are passed as their data, which are uint32 arrays.

  Attributes:
    program: The step as `jax.export` serializes it.
    stablehlo: The same program as text. Other tools read it, and it outlives
      `program`, which JAX loads for half a year of releases.
    manifest: Format number, versions, date, platforms, how many leading inputs are
      donated, and path, shape and dtype of each leaf of inputs and outputs.
    state: The first state, one array per path.
  """

  program: bytes
  stablehlo: str
  manifest: dict[str, Any]
  state: dict[str, Any]

  def save(self, folder: str | Path) -> None:
    """Write step.bin, step.mlir, state.npz and manifest.json.

    Args:
      folder: A folder, which is made if it does not exist. Files of these names in it
        are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = io.BytesIO()
    # np.savez takes names for its own arguments, such as 'file'.
    with zipfile.ZipFile(arrays, 'w') as archive:
      for path, array in self.state.items():
        with archive.open(f'{path}.npy', 'w', force_zip64=True) as member:
          np.lib.format.write_array(member, array, allow_pickle=False)
    files = {
      PROGRAM: self.program,
      TEXT: self.stablehlo.encode(),
      STATE: arrays.getvalue(),
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = json.dumps(self.manifest | {'sha256': hashes}, indent=1) + '\n'
    # The manifest comes last: without its hashes the other files are refused.
    for name, data in {**files, MANIFEST: manifest.encode()}.items():
      (folder / name).write_bytes(data)


class LoadedStep(NamedTuple):
  """A train step that :func:`load_exported_step` read.

  Attributes:
    step: `(state, *arguments) -> (state, results)`. A state is a list of arrays in the
      manifest's order, which is donated if the manifest says so; the arguments are the
      leaves of the step's other arguments. The results are a dict by path. A
      wrong number, shape or dtype of arrays raises a ValueError, and a value that is
      not an array a TypeError; the state is unchanged then.
    state: The first state.
    manifest: As in :class:`ExportedStep`.
  """

  step: Callable[..., tuple[list[jax.Array], dict[str, jax.Array]]]
  state: list[jax.Array]
  manifest: dict[str, Any]


def export_step(
  step: Callable[..., Any],
  state: Any,
  *args: Any,
  platforms: Sequence[str] = ('cpu', 'cuda'),
  donate: bool = True,
) -> ExportedStep:
  """Export a train step as a program that runs where only JAX is installed.

  JAX needs the package flatbuffers to write and to read it.

  The program contains the whole step: windows, model, loss, gradient and optimizer. It
  is one StableHLO program for the shapes of the given arguments. What a layer decides
  when it is traced, such as the layout of its arrays, is decided for the machine that
  exports.

  Args:
    step: A pure function `(state, *args)` -> (new state, results) or (new state,
      result, result, ...), such as `trainer.step`, where a state is a tree of arrays.
    state: The first state, concrete.
    *args: The other arguments, such as a :class:`Batch`: trees of arrays, or of
      `jax.ShapeDtypeStruct`.
    platforms: Platforms that the program is lowered for, out of 'cpu', 'cuda', 'rocm'
      and 'tpu'. More platforms make a larger file.
    donate: Whether a step may use the old state's memory for the new state.

  Returns:
    An :class:`ExportedStep`. Its `save` writes a folder.

  Raises:
    ImportError: The package flatbuffers, with which JAX serializes, is not installed.
    TypeError: `step` is not a function, or an argument holds a leaf that is not an
      array.
    ValueError: The step does not return a new state of the same structure, shapes and
      dtypes first, it runs on several devices, or a platform is unknown.

  Example:
    >>> import tempfile, jax.numpy as jnp, fptt_jax
    >>> def step(state, x):
    ...   return {'mean': 0.9 * state['mean'] + 0.1 * x.mean()}, state['mean']
    >>> state, folder = {'mean': jnp.zeros([])}, tempfile.mkdtemp()
    >>> exported = fptt_jax.export_step(step, state, jnp.ones(3))  # doctest: +SKIP
    >>> exported.save(folder)  # doctest: +SKIP
    >>> loaded = fptt_jax.load_exported_step(folder)  # doctest: +SKIP
    >>> state, results = loaded.step(loaded.state, jnp.ones(3))  # doctest: +SKIP
  """
  _check_flatbuffers()
  check_callable('step', step)
  for name, tree in (('state', state), ('args', args)):
    for path, leaf in jax.tree.leaves_with_path(tree):
      check_array(f'{name}{jax.tree_util.keystr(path)}', leaf)
  wanted = _known_platforms(platforms)
  num_state = len(jax.tree.leaves(state))
  # The structure of the results is known only once the step has been traced.
  outputs: dict[str, Any] = {}

  def flat_step(*leaves: jax.Array) -> list[jax.Array]:
    old = _with_keys(leaves[:num_state], state)
    arguments = _with_keys(leaves[num_state:], args)
    new, results = _split_outputs(step(old, *arguments))
    new = check_like('step', new, old, 'as the state it was given has it', True)
    outputs['results'] = jax.eval_shape(lambda: results)
    return [_key_data(jnp.asarray(leaf)) for leaf in jax.tree.leaves((new, results))]

  donated = num_state if check_flag('donate', donate) else 0
  jitted = jax.jit(flat_step, donate_argnums=tuple(range(donated)))
  leaves = jax.tree.leaves((state, args))
  # Typed keys exist in JAX alone; other runtimes know plain arrays.
  abstract = [jax.eval_shape(_key_data, leaf) for leaf in leaves]
  exported = export.export(jitted, platforms=wanted)(*abstract)
  _check_one_device(exported)
  manifest = {
    'format': FORMAT,
    'created': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'versions': {
      name: importlib.metadata.version(name) for name in ('fptt-jax', 'jax', 'jaxlib')
    },
    'calling_convention_version': exported.calling_convention_version,
    'platforms': list(exported.platforms),
    'donated': donated,
    'state': _describe_leaves(state),
    'arguments': _describe_leaves(args),
    'results': _describe_leaves(outputs['results']),
  }
  # Through JAX, since the program takes NumPy's 64 bits in JAX's default width.
  arrays = [np.asarray(jnp.asarray(_key_data(leaf))) for leaf in jax.tree.leaves(state)]
  distinct_paths('results', outputs['results'])
  first = dict(zip(distinct_paths('state', state), arrays, strict=True))
  return ExportedStep(
    bytes(exported.serialize()), exported.mlir_module(), manifest, first
  )


def _known_platforms(platforms: Any) -> tuple[str, ...]:
  """Return distinct platforms; raise a ValueError if there are none or unknown ones."""
  # A text would be taken for a sequence of its letters.
  wanted = () if isinstance(platforms, str) else tuple(dict.fromkeys(platforms))
  known = bool(wanted) and set(wanted) <= set(PLATFORMS)
  require(known, 'platforms', f'one or more out of {PLATFORMS}', platforms)
  return wanted


def _check_one_device(exported: export.Exported) -> None:
  """Raise a ValueError unless a program runs on one device."""
  hint = 'A trainer made without mesh= has the same states.'
  got = Words(f'one that runs on {exported.nr_devices} devices')
  fits = exported.nr_devices == 1
  require(fits, 'step', 'one that runs on one device', got, hint)


def load_exported_step(folder: str | Path) -> LoadedStep:
  """Load a train step that :meth:`ExportedStep.save` wrote.

  A program that has JAX and flatbuffers alone can do the same; the guide on exporting
  shows how.

  Args:
    folder: The folder.

  Returns:
    A :class:`LoadedStep`.

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: A file was changed after it was written, the format is another one, the
      step was exported for other platforms than the one in use, or this JAX no longer
      loads programs of its version.
    ImportError: The package flatbuffers is not installed.

  Example:
    See :func:`export_step`.
  """
  _check_flatbuffers()
  folder = Path(folder)
  manifest = json.loads((folder / MANIFEST).read_text())
  _check_manifest(manifest, folder)
  data = {name: (folder / name).read_bytes() for name in manifest['sha256']}
  for name, expected in manifest['sha256'].items():
    found = hashlib.sha256(data[name]).hexdigest()
    accepted = f'of the sha256 {expected} that {name} was written with'
    require(found == expected, str(folder / name), accepted, found, f'{AGAIN}.')
  # Hashes are compared first, since a damaged program may crash the process.
  exported = export.deserialize(bytearray(data[PROGRAM]))
  num_state = len(manifest['state'])
  donated = tuple(range(manifest['donated']))
  program = jax.jit(exported.call, donate_argnums=donated)
  paths = [leaf['path'] for leaf in manifest['results']]

  def step(
    state: Sequence[Any], *arguments: Any
  ) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    try:
      outputs = program(*state, *arguments)
    # Arguments are inspected only after JAX has refused them.
    except (TypeError, ValueError):
      _check_leaves('state', state, manifest['state'])
      _check_leaves('arguments', arguments, manifest['arguments'])
      raise
    results = dict(zip(paths, outputs[num_state:], strict=True))
    return list(outputs[:num_state]), results

  with np.load(io.BytesIO(data[STATE])) as arrays:
    # NumPy stores bfloat16 as bytes without a type.
    state = [
      jnp.asarray(arrays[leaf['path']].view(jnp.dtype(leaf['dtype'])))
      for leaf in manifest['state']
    ]
  return LoadedStep(step, state, manifest)


def _check_flatbuffers() -> None:
  """Raise an ImportError with what to install unless JAX can serialize programs."""
  try:
    import flatbuffers  # noqa: F401
  except ImportError as error:
    # JAX serializes programs with it.
    message = 'exported steps need flatbuffers: pip install flatbuffers.'
    raise ImportError(message) from error


def _check_leaves(
  name: str, leaves: Sequence[Any], expected: Sequence[Mapping[str, Any]]
) -> None:
  """Raise unless arrays are of the number, shapes and dtypes that a manifest says.

  Raises:
    TypeError: A leaf is not an array.
    ValueError: The number of arrays, a shape or a dtype is another one.
  """
  number = len(expected)
  require(len(leaves) == number, name, f'{number} arrays, as exported', len(leaves))
  for place, (leaf, entry) in enumerate(zip(leaves, expected, strict=True)):
    given = check_array(f'{name}[{place}]', leaf)
    found = Words(f'{jnp.result_type(given)}{list(given.shape)}')
    wanted = f'{entry["dtype"]}{entry["shape"]}'
    path = f' ({entry["path"]!r})' if entry['path'] else ''
    require(found == wanted, f'{name}[{place}]{path}', f'{wanted}, as exported', found)


def _check_manifest(manifest: Mapping[str, Any], folder: Path) -> None:
  """Raise a ValueError unless the installed JAX runs what a manifest describes."""
  form = manifest.get('format')
  name = f'the step in {folder}'
  require(form == FORMAT, name, f'of format {FORMAT}', form, f'{AGAIN}.')
  version = manifest['calling_convention_version']
  low = export.minimum_supported_calling_convention_version
  high = export.maximum_supported_calling_convention_version
  accepted = f'of calling convention {low} to {high}, which jax {jax.__version__} loads'
  hint = f'Jax {manifest["versions"]["jax"]} wrote it. {AGAIN}, or compile {TEXT}.'
  require(low <= version <= high, name, accepted, version, hint)
  # The backend 'gpu' is the platform 'cuda' or 'rocm'.
  platform = export.default_export_platform()
  given = manifest['platforms']
  hint = f'Export it with platforms including {platform!r}.'
  require(platform in given, name, f'for the platform {platform}', given, hint)


def _split_outputs(outputs: Any) -> tuple[Any, Any]:
  """Return the new state and the results that a step returned."""
  is_pair = type(outputs) is tuple and len(outputs) >= 2
  require(is_pair, 'the result of step', '(new state, results)', shapes(outputs))
  new, *results = outputs
  return new, results[0] if len(results) == 1 else tuple(results)


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
  """Return the data of a PRNG key, and any other array as it is."""
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _implementation(key: Any) -> Any:
  """Return the implementation of a PRNG key, which may be abstract."""
  return jax.random.key_impl(jnp.empty(0, key.dtype))


def _with_keys(leaves: Sequence[jax.Array], like: Any) -> Any:
  """Return leaves in the structure of `like`, with its PRNG keys made of their data."""
  expected = jax.tree.leaves(like)
  restored = [
    jax.random.wrap_key_data(leaf, impl=_implementation(as_key))
    if _is_key(as_key)
    else leaf
    for leaf, as_key in zip(leaves, expected, strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(like), restored)


def _describe_leaves(tree: Any) -> list[dict[str, Any]]:
  """Return path, shape and dtype of each leaf as the program takes or returns it."""
  described = []
  for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
    data = jax.eval_shape(_key_data, leaf)
    entry = {'path': path, 'shape': list(data.shape), 'dtype': str(data.dtype)}
    if _is_key(leaf):
      entry['prng_key'] = str(_implementation(leaf))
    described.append(entry)
  return described
