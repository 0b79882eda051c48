"""Signals: what was trained is saved, wherever the run is, and it goes on as if never
stopped.
"""

from collections.abc import Callable
import os
from pathlib import Path
import signal
from typing import Any

from interruption import assert_same_runs
import pytest
from test_images import make_config
from test_language_model import write_text

from experiments import add_task, images, language_model
from experiments.core import loop, population, signals

ADDING = dict(
  method=('fptt',),
  seq_len=12,
  hidden=4,
  batch_size=8,
  batches=12,
  eval_every=6,
  test_size=16,
  num_windows=3,
  steps_per_call=2,
)


def test_a_first_signal_is_noted_and_a_second_acts() -> None:
  """Ctrl-C twice is Ctrl-C; afterwards all is as it was before."""
  signal.signal(
    signal.SIGINT, signal.default_int_handler
  )  # Ignored where the tests run in the background.
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with signals.catch_signals():
    assert signals.requested() is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.requested() == 'SIGTERM'
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert signals.requested() is None
  assert [
    signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
  ] == before


def adding(folder: Path, **settings: Any) -> Callable[[str], list[dict[str, Any]]]:
  return lambda name: add_task.run(
    add_task.Config(**{**ADDING, **settings}), str(folder / name)
  )[1]


def epochs_of_images(
  folder: Path, **settings: Any
) -> Callable[[str], list[dict[str, Any]]]:
  config = make_config(
    folder,
    method=('fptt',),
    epochs=2,
    plateau_factor=2.0,
    dropout=0.3,
    steps_per_call=1,
    **settings,
  )
  return lambda name: images.run(config, str(folder / name))[1]


def epochs_of_text(
  folder: Path, **settings: Any
) -> Callable[[str], list[dict[str, Any]]]:
  shape = dict(
    task='text',
    seq_len=10,
    num_windows=3,
    batch_size=4,
    embedding=8,
    hidden=8,
    epochs=2,
    lr=1.0,
    steps_per_call=1,
  )
  config = language_model.Config(data_dir=str(write_text(folder)), **shape, **settings)
  return lambda name: language_model.run(config, str(folder / name))[1]


BY_THE_CLOCK = dict(checkpoint_minutes=1e-9)


@pytest.mark.parametrize(
  ('family', 'settings', 'clock'),
  [
    (adding, dict(seeds=(0, 1), population=2, devices=1), BY_THE_CLOCK),
    pytest.param(epochs_of_images, {}, BY_THE_CLOCK, marks=pytest.mark.slow),
    (epochs_of_text, dict(random_lengths=True), {}),
  ],
)
def test_a_stopped_run_goes_on_to_the_same_numbers(
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  family: Callable[..., Any],
  settings: dict[str, Any],
  clock: dict[str, Any],
) -> None:
  """SIGTERM in the middle of the second interval: saved there, between two evaluations;
  weights and metrics end the very same, also where a checkpoint is saved after each
  chunk.
  """
  run = family(tmp_path, **settings)
  calls: list[int] = []
  steps = population.Population.steps

  def counted(self: population.Population, *args: Any) -> Any:
    calls.append(0)
    return steps(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(population.Population, 'steps', counted)
    whole = run('whole')
  at = len(calls) // 2 + 1
  calls.clear()

  def interrupted(self: population.Population, *args: Any) -> Any:
    calls.append(0)
    if len(calls) == at:
      os.kill(os.getpid(), signal.SIGTERM)
    return steps(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(population.Population, 'steps', interrupted)
    with pytest.raises(
      signals.Stopped, match=r'stopped by SIGTERM, saved after batch \d+'
    ):
      family(tmp_path, **settings, **clock)('cut')
  assert len(calls) == at  # Not a chunk more than was under way.
  assert_same_runs(tmp_path, whole, family(tmp_path, **settings, **clock)('cut'))


def test_a_signal_after_the_last_batch_is_not_forgotten(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A script of several such runs would go on with the next."""
  end = loop.finish_run

  def interrupted(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    end(*args)

  monkeypatch.setattr(loop, 'finish_run', interrupted)
  with pytest.raises(
    signals.Stopped, match='stopped by SIGTERM; all these runs are finished'
  ):
    adding(tmp_path)('run')
  assert (tmp_path / 'run' / 'fptt-seed0' / 'result.json').exists()


def test_a_signal_between_two_runs_starts_no_other(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Nothing of the second one is compiled first."""
  end = loop.finish_run

  def interrupted(*args: Any) -> None:
    end(*args)
    os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(loop, 'finish_run', interrupted)
  with pytest.raises(signals.Stopped, match='stopped by SIGTERM between two runs'):
    adding(tmp_path, seeds=(0, 1), population=1)('run')
  assert (tmp_path / 'run' / 'fptt-seed0' / 'result.json').exists()
  assert not (tmp_path / 'run' / 'fptt-seed1').exists()


@pytest.mark.slow
def test_a_signal_during_dynamic_evaluation(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """It is not waited for; the next start evaluates the weights that were saved before
  it.
  """
  run, adapted = (
    epochs_of_text(tmp_path, dynamic_evaluation=True, dynamic_tokens=40),
    language_model.adapted,
  )

  def interrupted(*args: Any) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    return adapted(*args)

  with monkeypatch.context() as patch:
    patch.setattr(language_model, 'adapted', interrupted)
    with pytest.raises(
      signals.Stopped,
      match='stopped by SIGTERM after training, before the result of this run',
    ):
      run('cut')
  assert not (tmp_path / 'cut' / 'fptt-seed0' / 'result.json').exists()
  monkeypatch.setattr(population.Population, 'steps', None)  # Nothing is trained again.
  [summary] = run('cut')
  assert summary['epochs'] == 2
  assert summary['dynamic_test_ppl'] > 1
