"""Trained runs are read back from their folders, or refused; text is drawn from
them.
"""

from collections.abc import Callable
import json
import os
from pathlib import Path
import shutil
from typing import Any

from interruption import interrupted_at
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import add_task, data, images, language_model, load_run, online
from experiments.core import parameters, sampling, workdir
from experiments.core.flags import UserError
from experiments.data import synthetic
import fptt_jax

SOURCE = 'x_y = x y\n\tx\r\n' * 60
CHARACTERS = dict(
  task='text_c',
  seq_len=12,
  num_windows=2,
  batch_size=4,
  embedding=8,
  hidden=12,
  epochs=2,
  optimizer='adam',
  lr=0.03,
)


@pytest.fixture(scope='module')
def characters(
  tmp_path_factory: pytest.TempPathFactory,
) -> tuple[language_model.Config, Path, dict[str, Any]]:
  """A model of one text file's characters: (configuration, --workdir, what the run came
  to).
  """
  folder = tmp_path_factory.mktemp('characters')
  (folder / 'book.txt').write_bytes(SOURCE.encode())
  config = language_model.Config(
    data_dir=str(folder / 'book.txt'), momentum=None, **CHARACTERS
  )
  path, [summary] = language_model.run(config, str(folder / 'run'))
  return config, path, summary


def test_a_language_model_comes_back(
  characters: tuple[language_model.Config, Path, dict[str, Any]],
) -> None:
  """Its parameters give the very score that the run came to; the text is not needed."""
  config, path, summary = characters
  text = data.load_text('text_chars', config.data_dir)
  for folder in (path, str(path), path / 'fptt-seed0'):
    found = load_run(folder)
    assert (found.script, found.vocabulary) == ('language_model', text.vocabulary)
    assert (found.config.hidden, found.config.seeds, found.config.data_dir) == (
      12,
      (0,),
      config.data_dir,
    )
    assert found.result['valid_bpc'] == summary['valid_bpc']
  task = language_model.make_task(config, text, 'fptt', 1)
  assert task.reporter.validate(found.params) == pytest.approx(
    summary['valid_bpc'], rel=1e-6
  )


def test_images_come_back(tmp_path: Path) -> None:
  """The best of a grid, with what its inputs are normalized by and the order of its
  steps.
  """
  settings: dict[str, Any] = dict(
    task='arrays',
    row=True,
    hidden=8,
    batch_size=8,
    valid_size=16,
    epochs=1,
    num_windows=2,
  )
  config = images.Config(
    data_dir=synthetic.data_files(tmp_path / 'data')['images'],
    grid=('lr=1e-3:1e-2',),
    workdir=str(tmp_path / 'run'),
    **settings,
  )
  images.main(config)
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  found = load_run(tmp_path / 'run')
  assert found.folder.name == summary['best']
  assert found.config.lr in (1e-3, 1e-2)
  assert f'lr{found.config.lr:g}' in summary['best']
  assert (found.moments, found.order, found.config.grid) == (
    data.MOMENTS['arrays'],
    None,
    (),
  )
  sequences, _ = images.load(config)
  task = images.make_task(found.config, sequences, 'fptt', 1)
  assert task.reporter.validate(found.params) == pytest.approx(
    found.result['valid_accuracy']
  )


def test_a_problem_with_long_dependencies_comes_back(tmp_path: Path) -> None:
  """The weights after the last batch: the test loss is the one in the result."""
  config = online.Config(
    task='recall',
    cell='lru',
    influence='rtrl',
    hidden=4,
    seq_len=12,
    num_windows=3,
    batch_size=4,
    batches=4,
    eval_every=2,
    test_steps=16,
  )
  path, [summary] = online.run(config, str(tmp_path / 'run'))
  found = load_run(path / summary['run'])
  assert (found.script, found.config.task) == ('online', 'recall')
  task = online.make_task(found.config, [0], 'tbptt', 1)
  test, _ = online.test_batch(found.config, 0)
  sums, _ = task.trainer.evaluate(found.params, test)
  loss = fptt_jax.compute_metrics(sums)['loss']
  assert loss == pytest.approx(found.result['test_recall'], rel=1e-5)


@pytest.fixture(scope='module')
def adding(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The --workdir of two runs of the adding problem that have ended, without a
  summary.json.
  """
  folder = tmp_path_factory.mktemp('adding')
  config = add_task.Config(
    method=('fptt',),
    seeds=(0, 1),
    seq_len=12,
    hidden=4,
    batch_size=8,
    batches=4,
    eval_every=2,
    test_size=16,
    num_windows=3,
  )
  return add_task.run(config, str(folder / 'run'))[0]


def test_the_adding_problem_comes_back(adding: Path) -> None:
  """The weights after the last batch: the test error is the one in the result."""
  found = load_run(adding / 'fptt-seed1')
  assert found.config.seeds == (1,)
  _, _, test_key = jax.random.split(jax.random.key(1), 3)
  batch = add_task.draw_batch(test_key, 12, 16)
  _, outputs = found.model.apply(
    found.params, found.model.initial_state(16), batch.inputs, None, None
  )
  error = np.mean((np.asarray(outputs)[-1, :, 0] - batch.targets) ** 2)
  assert error == pytest.approx(found.result['test_mse'], rel=1e-5)


def truncate(path: Path) -> None:
  path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def change(path: Path, **values: Any) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


RUN = 'fptt-seed0'
DAMAGES: list[tuple[str, Callable[[Path], Any]]] = [
  ('there is no folder', shutil.rmtree),
  ('no config.json', lambda folder: (folder / 'config.json').unlink()),
  (
    'fptt-seed0 has no result yet',
    lambda folder: (folder / RUN / 'result.json').unlink(),
  ),
  (
    'parameters.npz: put it back',
    lambda folder: (folder / RUN / 'parameters.npz').unlink(),
  ),
  ('parameters.npz is damaged', lambda folder: flip(folder / RUN / 'parameters.npz')),
  (
    'parameters.npz is damaged',
    lambda folder: truncate(folder / RUN / 'parameters.npz'),
  ),
  (
    'parameters.npz is damaged',
    lambda folder: (folder / RUN / 'parameters.npz').write_bytes(b''),
  ),
  (
    'parameters.npz is damaged',
    lambda folder: (folder / RUN / 'parameters.npz').write_bytes(bytes(99)),
  ),
  (
    'parameters.npz is of another configuration',
    lambda folder: np.savez(folder / RUN / 'parameters.npz', a=np.ones(3)),
  ),
  (
    'parameters.npz does not fit',
    lambda folder: change(folder / 'config.json', hidden=5),
  ),
  (
    'config.json .*damaged.*hidden',
    lambda folder: change(folder / 'config.json', hidden='many'),
  ),
  (
    'of add_task, images',
    lambda folder: change(folder / 'config.json', script='other'),
  ),
  (
    'has no result under the settings',
    lambda folder: change(folder / 'config.json', sha256='0'),
  ),
  ('config.json is damaged', lambda folder: truncate(folder / 'config.json')),
  (
    'config.json is damaged: it holds 3',
    lambda folder: (folder / 'config.json').write_text('3'),
  ),
  (
    'result.json is damaged: it holds null',
    lambda folder: (folder / RUN / 'result.json').write_text('null'),
  ),
  (
    'result.json is damaged: it has no "method"',
    lambda folder: (folder / RUN / 'result.json').write_text('{}'),
  ),
  (
    'has diverged',
    lambda folder: (
      (folder / RUN / 'parameters.npz').unlink(),
      change(folder / RUN / 'result.json', lost='x'),
    ),
  ),
]


@pytest.mark.parametrize(
  ('message', 'damage'),
  DAMAGES,
  ids=[f'{n}-{message}' for n, (message, _) in enumerate(DAMAGES)],
)
def test_what_is_damaged_is_refused(
  message: str, damage: Callable[[Path], Any], adding: Path, tmp_path: Path
) -> None:
  """With one line that names the file."""
  folder = tmp_path / 'run'
  shutil.copytree(adding, folder)
  damage(folder)
  with pytest.raises(UserError, match=message) as caught:
    load_run(folder / RUN if folder.exists() else folder)
  assert '\n' not in str(caught.value)


def test_several_runs_and_unfinished_ones_are_told_apart(
  adding: Path, tmp_path: Path
) -> None:
  """Which ones there are, where none is the best; that none has ended."""
  with pytest.raises(UserError, match=r'several runs.*fptt-seed0, fptt-seed1'):
    load_run(adding)
  folder = tmp_path / 'cut'
  with interrupted_at(1):
    add_task.run(
      add_task.Config(
        seq_len=12, hidden=4, batch_size=8, batches=4, eval_every=2, test_size=16
      ),
      str(folder),
    )
  with pytest.raises(UserError, match=r'no run in .* has a result yet'):
    load_run(folder)


def test_what_diverged_has_no_parameters(tmp_path: Path) -> None:
  """And it is said why."""
  for split in ('train', 'valid', 'test'):
    (tmp_path / f'ptb.{split}.txt').write_text('a b c d\n' * 60)
  settings = CHARACTERS | dict(
    task='text', optimizer='sgd', lr=1e30, method=('tbptt',), momentum=0.0
  )
  path, _ = language_model.run(
    language_model.Config(data_dir=str(tmp_path), **settings), str(tmp_path / 'run')
  )
  with pytest.raises(UserError, match='tbptt-seed0 has diverged'):
    load_run(path)


def test_a_vocabulary_of_another_text_is_refused(
  characters: tuple[language_model.Config, Path, dict[str, Any]], tmp_path: Path
) -> None:
  """data.json is damaged, or not there."""
  shutil.copytree(characters[1], tmp_path / 'run')
  path = tmp_path / 'run' / 'data.json'
  for content, message in (
    ('{"data_dir": "x", "vocabulary": ["a"]}', 'does not fit'),
    ('[]', 'damaged'),
    ('{}', '"data_dir"'),
  ):
    path.write_text(content)
    with pytest.raises(UserError, match=message):
      load_run(tmp_path / 'run')
  path.unlink()
  with pytest.raises(UserError, match=r'cannot read .*data\.json'):
    load_run(tmp_path / 'run')


# Sampling.


def test_text_is_drawn(
  characters: tuple[language_model.Config, Path, dict[str, Any]],
  capsys: pytest.CaptureFixture[str],
) -> None:
  """After the prompt, as many characters as asked for, out of the text's own; the same
  for the same seed.
  """
  _, path, _ = characters
  shown = []
  for seed in (0, 0, 1):
    config = language_model.Config(
      sample=200, prompt='x_y =', workdir=str(path), sample_seed=seed
    )
    language_model.main(config)
    shown.append(capsys.readouterr().out.removesuffix('\n'))
  assert shown[0] == shown[1] != shown[2]
  assert shown[0].startswith('x_y =')
  assert len(shown[0]) == 5 + 200
  assert set(shown[0]) <= set(SOURCE)
  assert not (path / 'book.txt').exists()


def test_a_prompt_of_unknown_characters_is_refused(
  characters: tuple[language_model.Config, Path, dict[str, Any]],
) -> None:
  """The character is named."""
  found = load_run(characters[1])
  with pytest.raises(UserError, match=r"--prompt .*'Q'"):
    sampling.sample_text(found, 3, prompt='xQ')


def test_draws_follow_the_model_s_probabilities(
  characters: tuple[language_model.Config, Path, dict[str, Any]],
) -> None:
  """Greedy draws are the arg max of a loop over single steps; a low temperature draws
  the same; a high one draws evenly.
  """
  found = load_run(characters[1])
  prompt, key = jnp.array([0, 1, 2], jnp.int32), jax.random.key(0)
  greedy = sampling.draw_tokens(
    found.model, found.params, prompt, key, 1.0, number=12, greedy=True
  )
  tokens = prompt.tolist()
  for _ in range(4):
    _, outputs = found.model.apply(
      found.params, found.model.initial_state(1), jnp.array(tokens)[:, None], None, None
    )
    tokens.append(int(outputs[-1, 0].argmax()))
  assert greedy[:4].tolist() == tokens[3:]
  cold = sampling.draw_tokens(found.model, found.params, prompt, key, 1e-4, number=12)
  assert cold.tolist() == greedy.tolist()
  hot = sampling.draw_tokens(found.model, found.params, prompt, key, 1e6, number=3000)
  counts = np.bincount(hot, minlength=len(found.vocabulary or []))
  assert counts.min() > 0.6 * counts.max()


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(sample=3), '--workdir'),
    (dict(sample=-1, workdir='x'), '--sample .*-1'),
    (dict(prompt='a'), '--prompt .*a'),
    (dict(sample=3, workdir='x', temperature=-1.0), r'--temperature .*-1\.0'),
  ],
)
def test_sampling_without_sense_is_refused(
  settings: dict[str, Any], message: str
) -> None:
  """Before anything is read."""
  with pytest.raises(ValueError, match=message):
    language_model.Config(data_dir='folder', **settings)


def test_a_run_of_another_script_draws_no_text(adding: Path) -> None:
  """Its name is said."""
  with pytest.raises(UserError, match='add_task'):
    language_model.main(
      language_model.Config(sample=3, workdir=str(adding / 'fptt-seed0'))
    )


# NumPy 2.0 leaves the archive open, and its destructor complains of the full disk, too.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_parameters_survive_a_full_disk(tmp_path: Path) -> None:
  """One line; nothing half-written stands for them."""
  (tmp_path / 'run').mkdir()
  temporary = tmp_path / 'run' / f'parameters.npz.{os.getpid()}.tmp'
  temporary.symlink_to('/dev/full')
  workdir.open_workdir(str(tmp_path), 'add_task', add_task.Config())
  with pytest.raises(UserError, match=r'cannot write .*parameters\.npz.*No space'):
    parameters.write_parameters(tmp_path / 'run', {'w': jnp.ones(3000)})
  assert not (tmp_path / 'run' / 'parameters.npz').exists()
