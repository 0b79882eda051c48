"""Trained runs, read from their folders without their training data."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.core import files, parameters, workdir
from experiments.core.flags import UserError
from experiments.core.recipe import HYPERPARAMETERS
import fptt_jax

SCRIPTS = ('add_task', 'images', 'language_model', 'online')
"""Scripts whose runs can be read."""


DRAWN = ('add_task', 'online')
"""Scripts that draw their data; their folders have no data.json."""


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """One run that has ended.

  Attributes:
    folder: folder of the run.
    script: the script that trained it, 'add_task', 'images', 'language_model' or
      'online'.
    config: settings of the run, with its values of a grid.
    model: the model.
    params: the parameters of the run's result. They are those of the epoch with the
      best validation score; of a script in `DRAWN`, those after the last batch.
    result: content of result.json.
    vocabulary: the V token strings by id, of a language model.
    moments: mean and standard deviation by which pixels are normalized, of images.
    order: int [T], the fixed order of the steps, of permuted images.
  """

  folder: Path
  script: str
  config: Any
  model: fptt_jax.Model
  params: Any
  result: dict[str, Any]
  vocabulary: list[str] | None = None
  moments: tuple[float, float] | None = None
  order: np.ndarray | None = None


def load_run(folder: str | Path) -> TrainedRun:
  """Read a trained run.

  Args:
    folder: the folder of one run, or a --workdir. A --workdir stands for the best run
      that its summary.json names, or for the only run that has ended.

  Returns:
    The run.

  Raises:
    UserError: there is no such run, it has not ended, it diverged before it had any
      result, or one of its files is damaged.
  """
  root, path = _find(Path(folder).expanduser().absolute())
  described = workdir.read_config(root)
  if not (path / 'result.json').is_file():
    raise UserError(f'{path} has no result yet: run its command again to resume it.')
  result = files.read_json(path / 'result.json', ('method', 'seed', 'config_sha256'))
  # The settings were changed by --allow_config_change, and the run did not go on.
  if result['config_sha256'] != described['sha256']:
    raise UserError(
      f'{path} has no result under the settings of config.json: run its command again.'
    )
  if described['script'] not in SCRIPTS:
    raise UserError(
      f'{root} was made by {described["script"]!r}; load_run reads runs of '
      f'{", ".join(SCRIPTS)}.'
    )
  script = importlib.import_module(f'experiments.{described["script"]}')
  data: dict[str, Any] = {}
  if described['script'] not in DRAWN:
    data = files.read_json(root / 'data.json', script.DESCRIBED)
  try:
    config = _configuration(script, described, result, data)
    model = script.model_of(config, data)
    template = jax.eval_shape(model.init, jax.random.key(0))
  except (TypeError, ValueError) as error:
    raise UserError(f'{root}: config.json or data.json is damaged: {error}') from error
  has_no_score = 'lost' in result or result.get('best_epoch') == 0
  if has_no_score and not (path / parameters.PARAMETERS_FILE).exists():
    raise UserError(
      f'{path} has diverged and left no parameters: '
      f'{result.get("lost", "no score is finite")}.'
    )
  params = parameters.read_parameters(path, template, described['sha256'])
  return TrainedRun(
    folder=path,
    script=described['script'],
    config=config,
    model=model,
    params=params,
    result=result,
    vocabulary=data.get('vocabulary'),
    moments=tuple(data['moments']) if 'moments' in data else None,
    order=None if data.get('order') is None else np.array(data['order']),
  )


def _find(path: Path) -> tuple[Path, Path]:
  """Return the --workdir and the folder of a run.

  Args:
    path: the folder of a run or a --workdir.

  Raises:
    UserError: there is no run, none has ended, or there are several to choose from.
  """
  if not path.is_dir():
    raise UserError(f'there is no folder {path}.')
  if not (path / 'config.json').exists():
    if (path.parent / 'config.json').exists():
      return path.parent, path
    raise UserError(f'{path} holds no run: it has no config.json.')
  # Folders with a lock are runs; the --workdir may hold other folders.
  started = sorted(place.parent for place in path.glob('*/lock'))
  ended = [place for place in started if (place / 'result.json').is_file()]
  if not ended:
    raise UserError(
      f'no run in {path} has a result yet: run the command again to resume them.'
    )
  if len(ended) > 1 and (path / 'summary.json').exists():
    best = files.read_json(path / 'summary.json').get('best')
    ended = [place for place in ended if place.name == best] or ended
  if len(ended) > 1:
    names = ', '.join(place.name for place in ended)
    raise UserError(
      f'{path} holds several runs: give the folder of one of them, {names}.'
    )
  return path, ended[0]


def _configuration(
  script: Any, described: dict[str, Any], result: dict[str, Any], data: dict[str, Any]
) -> Any:
  """Return the configuration of one run.

  Args:
    script: module of the script.
    described: content of config.json.
    result: content of result.json.
    data: content of data.json.

  Raises:
    ValueError: the script does not accept a setting.
  """
  settings = {}
  # Runs of older versions lack newer settings, which get their defaults.
  for field in dataclasses.fields(script.Config):
    if field.name in described:
      value = described[field.name]
      settings[field.name] = tuple(value) if isinstance(value, list) else value
  # A result has the values of a grid and the tuned rates, which config.json lacks.
  settings |= {name: result[name] for name in HYPERPARAMETERS if name in result}
  settings |= {'grid': (), 'method': (result['method'],), 'seeds': (result['seed'],)}
  if 'data_dir' in data:
    settings['data_dir'] = data['data_dir']
  return script.Config(**settings)
