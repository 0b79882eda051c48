"""The language-model script."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import helpers
from interruption import interrupted_at
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import data, dynamic_evaluation, language_model
from experiments.core import cells, files, optimizers, recipe
from experiments.core.flags import UserError
from experiments.data import streams
import fptt_jax

TINY = dict(
  task='text',
  seq_len=10,
  num_windows=3,
  batch_size=4,
  embedding=8,
  hidden=8,
  epochs=3,
  lr=1.0,
)


def write_text(
  folder: Path, counts: tuple[int, int, int] = (420, 105, 70), turned: bool = False
) -> Path:
  """A text with a rule to learn: numbers in a cycle, a line each seven words; if
  turned, backwards in validation and test.
  """
  for split, count in zip(('train', 'valid', 'test'), counts, strict=True):
    words = [f'w{(-n if turned and split != "train" else n) % 5}' for n in range(count)]
    lines = [' ' + ' '.join(words[n : n + 7]) + ' \n' for n in range(0, count, 7)]
    (folder / f'ptb.{split}.txt').write_text(''.join(lines))
  return folder


@pytest.mark.parametrize('length', [9, 61, 80, 83])
def test_sequences_cover_each_stream_once(length: int) -> None:
  """Row b of the batches, put end to end without the padding, is stream b; targets are
  the inputs one word on.
  """
  tokens, batch_size, seq_len = np.arange(length, dtype=np.int32), 4, 10
  batches = list(streams.sequences(tokens, seq_len, batch_size))
  stream = length // batch_size
  rows: list[list[int]] = [[] for _ in range(batch_size)]
  for batch in batches:
    assert batch.inputs.shape == batch.targets.shape == (seq_len, batch_size)
    lengths = (
      batch.lengths if batch.lengths is not None else np.full(batch_size, seq_len)
    )
    for b in range(batch_size):
      np.testing.assert_array_equal(
        batch.targets[: lengths[b], b], batch.inputs[: lengths[b], b] + 1
      )
      rows[b] += batch.inputs[: lengths[b], b].tolist()
  for b in range(batch_size):
    assert rows[b] == list(range(b * stream, (b + 1) * stream - 1))
  side_by_side = jnp.asarray(
    np.pad(streams.streams(tokens, batch_size), ((0, seq_len), (0, 0)))
  )
  places = [
    jax.tree.map(lambda leaf, number=number: leaf[number], place)
    for place in streams.places(stream, seq_len)
    for number in range(len(place.start))
  ]
  for batch, place in zip(
    batches, places, strict=True
  ):  # On the device, in a program, the same batches.
    read = streams.read(side_by_side, place, seq_len)
    np.testing.assert_array_equal(
      read.inputs[: place.steps], batch.inputs[: place.steps]
    )
    np.testing.assert_array_equal(
      read.targets[: place.steps], batch.targets[: place.steps]
    )
    assert (read.lengths is None) == (batch.lengths is None)
    np.testing.assert_array_equal(
      read.lengths if read.lengths is not None else 0,
      batch.lengths if read.lengths is not None else 0,
    )
  with pytest.raises(UserError, match='too short for 4 parallel streams'):
    list(streams.sequences(tokens[:7], seq_len, batch_size))


def test_perplexity_is_that_of_the_whole_text_in_one_pass(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Cut into pieces with the hidden state carried on, or read at once: the same number;
  a constant model has perplexity V.
  """
  config = language_model.Config(data_dir='.', **TINY)
  model = language_model.make_model(config, 6)
  loss = fptt_jax.losses.sequence_classification(6)
  trainer = fptt_jax.make_trainer(model, loss, optax.sgd(0.1), method='tbptt')
  params = model.init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 6, 101).astype(np.int32)
  monkeypatch.setattr(language_model, 'EVALUATION_STEPS', 16)
  pieces = math.exp(language_model.nats(trainer, params, tokens))
  _, logits = model.apply(
    params, model.initial_state(1), jnp.asarray(tokens[:-1, None]), None, None
  )
  nll = -jax.nn.log_softmax(logits[:, 0])[jnp.arange(100), tokens[1:]]
  assert pieces == pytest.approx(math.exp(nll.mean()), rel=1e-5)
  zero = jax.tree.map(jnp.zeros_like, params)
  assert math.exp(language_model.nats(trainer, zero, tokens)) == pytest.approx(
    6.0, rel=1e-5
  )


def test_script_learns_a_text_and_writes_its_folder(tmp_path: Path) -> None:
  """On a text with a rule validation perplexity falls far below the vocabulary's size;
  test is measured at the best epoch.
  """
  config = language_model.Config(
    data_dir=str(write_text(tmp_path)),
    method=('fptt', 'tbptt'),
    workdir=str(tmp_path / 'run'),
    **{**TINY, 'epochs': 6},
  )
  language_model.main(config)
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  for run in summary['runs']:
    rows = files.read_jsonl(
      tmp_path / 'run' / f'{run["method"]}-seed0' / 'metrics.jsonl'
    )
    assert run['valid_ppl'] == min(row['valid_ppl'] for row in rows) < 3.5
    assert run['best_epoch'] == min(rows, key=lambda row: row['valid_ppl'])['step']
    assert run['test_ppl'] < 3.5
    assert [row['updates'] for row in rows] == [
      36 * epoch for epoch in range(1, 7)
    ]  # 11 sequences of 3, one with 9 of 10 steps
    assert run['parameters'] == 6 * 8 + (4 * 8 * 17) + 8 * 6 + 6
  assert (tmp_path / 'run' / 'valid_ppl.png').stat().st_size > 10_000


def test_learning_rate_falls_on_a_plateau_and_training_stops_below_the_least(
  tmp_path: Path,
) -> None:
  """At a learning rate that cannot improve, each epoch divides it, until it is below
  --min_lr.
  """
  settings = {
    **TINY,
    'epochs': 9,
    'lr': 1e-30,
    'dropout': 0.0,
    'min_lr': 1e-31,
    'plateau_factor': 4.0,
  }
  config = language_model.Config(
    data_dir=str(write_text(tmp_path)), method=('tbptt',), **settings
  )
  _, [summary] = language_model.run(config, str(tmp_path / 'run'))
  rows = files.read_jsonl(tmp_path / 'run' / 'tbptt-seed0' / 'metrics.jsonl')
  np.testing.assert_allclose(
    [row['lr'] for row in rows], [1e-30, 1e-30, 2.5e-31], rtol=1e-6
  )
  assert (summary['epochs'], summary['best_epoch']) == (3, 1)


def test_interrupted_run_resumes_to_the_same_numbers(tmp_path: Path) -> None:
  """Stopped after an epoch's metrics and before its checkpoint, a run goes on to the
  metrics of one never stopped; with dropout, restart of the recursion, evaluation at
  the summary.
  """
  config = language_model.Config(
    data_dir=str(write_text(tmp_path)),
    seeds=(1,),
    restart_each_epoch=True,
    evaluate_at='w_bar',
    **TINY,
  )
  _, [whole] = language_model.run(config, str(tmp_path / 'whole'))
  with interrupted_at(2):
    language_model.run(config, str(tmp_path / 'cut'))
  _, [resumed] = language_model.run(config, str(tmp_path / 'cut'))
  assert {**resumed, 'seconds': 0} == {**whole, 'seconds': 0}
  paths = [
    tmp_path / name / 'fptt-seed1' / 'metrics.jsonl' for name in ('whole', 'cut')
  ]
  curves = [[{**row, 'seconds': 0} for row in files.read_jsonl(file)] for file in paths]
  assert curves[0] == curves[1]


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(data_dir='', task='text'), "--data_dir must be given with --task='text'"),
    (
      dict(method=('fptt', 'tbptt_final')),
      '--method must be without tbptt_final, which takes no padded',
    ),
    (dict(dropout=1.0), r'--dropout must be .*, got 1.0'),
    (dict(epochs=0), '--epochs must be .*, got 0'),
    (
      dict(plateau_factor=0.5),
      '--plateau_factor must be .*, got 0.5',
    ),
    (
      dict(tied=True, hidden=128),
      '--last_hidden must be the embedding size 256 with --tied and without --experts, '
      'got 128',
    ),
    (dict(experts=3), '--experts must be .*, got 3'),
    (dict(milestones=(0,)), r'--milestones must be .*, got 0'),
    (
      dict(num_windows=301),
      'num_windows must be an integer between 1 and the sequence length T=300, got 301',
    ),
  ],
)
def test_settings_of_no_meaning_are_refused(
  settings: dict[str, Any], message: str
) -> None:
  """As for the adding problem."""
  with pytest.raises(ValueError, match=message):
    language_model.Config(**{'data_dir': 'folder', **settings})


@pytest.mark.parametrize('method', ['bptt', 'tbptt'])
@pytest.mark.parametrize('random_lengths', [False, True])
def test_the_rate_decays_to_nothing(method: str, random_lengths: bool) -> None:
  """By the last update of the last epoch. The last batch of an epoch is short, so that
  its last windows make no update.
  """
  config = language_model.Config(
    **TINY
    | dict(data_dir='.', method=(method,), decay=True, epochs=4)
    | (dict(seq_len=20, random_lengths=True) if random_lengths else {})
  )
  made = 0
  for epoch in range(1, config.epochs + 1):
    for portion in language_model.portions(config, method, 24, 0, epoch):
      made += int(portion.updates.sum())
  assert language_model.num_updates(config, method, 24) == made
  _, updates = recipe.updates_per_sequence(config, method, config.padded_len)
  if method == 'tbptt' and not random_lengths:
    assert made < config.epochs * 3 * updates


def test_divergence_is_said_and_nothing_of_it_is_kept(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """At an absurd learning rate the run stops with a word; metrics are valid JSON; the
  same command again ends the same way.
  """
  config = language_model.Config(
    data_dir=str(write_text(tmp_path)),
    method=('tbptt',),
    workdir=str(tmp_path / 'run'),
    **{**TINY, 'lr': 1e30},
  )
  for said in (True, False):
    language_model.main(config)
    assert ('epoch   1  diverged' in capsys.readouterr().out) == said
    [row] = files.read_jsonl(tmp_path / 'run' / 'tbptt-seed0' / 'metrics.jsonl')
    assert row['train_ppl'] is None
    [summary] = json.loads((tmp_path / 'run' / 'summary.json').read_text())['runs']
    assert (summary['valid_ppl'], summary['test_ppl']) == (None, None)


def test_training_may_be_cut_to_the_first_tokens(tmp_path: Path) -> None:
  """Fewer updates an epoch; vocabulary and the texts it is validated and tested on stay
  whole.
  """
  config = language_model.Config(
    data_dir=str(write_text(tmp_path)),
    method=('tbptt',),
    **{**TINY, 'epochs': 1, 'train_tokens': 84},
  )
  path, [summary] = language_model.run(config, str(tmp_path / 'run'))
  [row] = files.read_jsonl(path / 'tbptt-seed0' / 'metrics.jsonl')
  assert row['updates'] == 6  # Streams of 21 tokens: two sequences in 3 windows.
  assert summary['parameters'] == 6 * 8 + (4 * 8 * 17) + 8 * 6 + 6


def test_random_lengths_cover_the_text_and_scale_the_learning_rate(
  tmp_path: Path,
) -> None:
  """The pieces put end to end are the streams; lengths scatter around T with deviation
  5, or T/2; the factor is length/T; an epoch is drawn alike whatever ran before it,
  another epoch otherwise.
  """
  config = language_model.Config(
    data_dir=str(tmp_path),
    **{**TINY, 'seq_len': 40, 'random_lengths': True, 'batch_size': 2},
  )
  side_by_side = (
    np.arange(10_000, dtype=np.int32)[:, None]
    + 10_000 * np.arange(2, dtype=np.int32)[None, :]
  )
  draw = lambda epoch, seed=0: list(
    language_model.portions(config, 'fptt', 10_000, seed, epoch)
  )
  portions = draw(1)
  padded = jnp.asarray(np.pad(side_by_side, ((0, 55), (0, 0))))
  batches = [
    streams.read(padded, jax.tree.map(lambda leaf: leaf[0], portion.items), 55)
    for portion in portions
  ]
  lengths = np.array([batch.lengths[0] for batch in batches])
  rows = [
    batch.inputs[:length, 1] for batch, length in zip(batches, lengths, strict=True)
  ]
  np.testing.assert_array_equal(np.concatenate(rows), np.arange(10_000, 19_999))
  assert {batch.inputs.shape for batch in batches} == {(55, 2)}
  np.testing.assert_allclose([portion.lr_factor for portion in portions], lengths / 40)
  assert np.std(lengths[lengths > 30]) == pytest.approx(5, abs=1)
  assert 0.01 < np.mean(lengths < 28) < 0.12
  starts = fptt_jax.make_windows(55, num_windows=3).starts
  assert [portion.updates.tolist() for portion in portions] == [
    [int(np.sum(starts < length))] for length in lengths
  ]
  factors = lambda portions: [portion.lr_factor for portion in portions]
  assert factors(draw(1)) == factors(portions)
  assert factors(draw(2)) != factors(portions)
  assert factors(draw(1, seed=1)) != factors(portions)


@pytest.mark.slow
def test_the_whole_recipe_of_ptb_w_learns_a_rule(tmp_path: Path) -> None:
  """Mixture of softmaxes, all dropouts, penalties, random lengths, averaging, dynamic
  evaluation, by one run through all of it: far from the 6 of chance. The test text
  follows the same rule, which leaves dynamic evaluation nothing to gain, nor to
  lose.
  """
  small: dict[str, Any] = dict(
    seq_len=12,
    batch_size=4,
    embedding=16,
    hidden=16,
    last_hidden=16,
    experts=2,
    epochs=6,
    average_after=1,
  )
  small |= dict.fromkeys(
    (name for name in language_model.TASKS['ptb_w'] if name.endswith('dropout')), 0.05
  )
  small |= dict(
    optimizer='adam',
    lr=0.03,
    momentum=None,
    alpha=0.01,
    beta=0.5,
    clip=1.0,
    weight_decay=0.0,
  )
  config = language_model.Config(
    task='text',
    data_dir=str(write_text(tmp_path)),
    **language_model.TASKS['ptb_w'] | small,
  )
  _, [summary] = language_model.run(config, str(tmp_path / 'run'))
  assert summary['epochs'] == 6
  assert 1 < summary['test_ppl'] < 2.5
  assert summary['dynamic_test_ppl'] == pytest.approx(summary['test_ppl'], rel=0.02)
  assert summary['recurrent_parameters'] == 3 * 4 * 16 * (16 + 16 + 1)


@pytest.mark.slow
def test_dynamic_evaluation_follows_a_text_that_turns(tmp_path: Path) -> None:
  """A model that has learned one order, by the script, meets the other one: it adapts
  while it is tested.
  """
  settings = dict(
    seq_len=12,
    batch_size=4,
    embedding=16,
    hidden=16,
    epochs=6,
    optimizer='adam',
    lr=0.03,
  )
  config = language_model.Config(
    **TINY | settings | dict(data_dir=str(write_text(tmp_path)))
  )
  _, [before] = language_model.run(config, str(tmp_path / 'run'))
  assert before['test_ppl'] < 1.5
  turned = write_text(tmp_path, (420, 1050, 1050), turned=True)
  again = dataclasses.replace(
    config, data_dir=str(turned), dynamic_evaluation=True, allow_config_change=True
  )
  _, [after] = language_model.run(again, str(tmp_path / 'run'))
  assert after['best_epoch'] == before['best_epoch']
  assert after['dynamic_test_ppl'] < 0.9 * after['test_ppl']


@pytest.mark.parametrize(('tokens', 'size'), [(2100, 100), (420, 80)])
def test_dynamic_evaluation_has_streams_of_its_own(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, size: int
) -> None:
  """As many as the authors', whatever the batch size of training: the size of a step
  depends on them.
  """

  class Seen(Exception):
    pass

  def statistics(
    model: Any, loss: Any, params: Any, batches: Any, segment: int
  ) -> None:
    raise Seen(next(iter(batches)).inputs.shape[1])

  monkeypatch.setattr(dynamic_evaluation, 'gradient_statistics', statistics)
  folder = write_text(tmp_path, (tokens, 105, 70))
  config = language_model.Config(**TINY | dict(data_dir=str(folder)))
  text = data.load_text('text', folder)
  with pytest.raises(Seen) as seen:
    language_model.adapted(config, None, None, None, text, tmp_path)
  assert seen.value.args == (size,)


@pytest.mark.slow
def test_the_test_text_can_be_left_alone(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """--evaluate_test=false: it is not evaluated, by dynamic evaluation neither; with
  --allow_config_change it is, later.
  """
  config = language_model.Config(
    **TINY
    | dict(
      data_dir=str(write_text(tmp_path)), evaluate_test=False, dynamic_evaluation=True
    )
  )
  with monkeypatch.context() as patch:
    patch.setattr(language_model, 'adapted', None)
    _, [summary] = language_model.run(config, str(tmp_path / 'run'))
  assert summary['test_ppl'] is None
  assert summary['valid_ppl'] > 1
  _, [summary] = language_model.run(
    dataclasses.replace(config, evaluate_test=True, allow_config_change=True),
    str(tmp_path / 'run'),
  )
  assert summary['test_ppl'] > 1
  assert summary['dynamic_test_ppl'] > 1


def test_a_rate_below_the_least_is_refused() -> None:
  """Such a run would end before it began."""
  with pytest.raises(
    ValueError,
    match=r'--min_lr must be .*, got 0\.001',
  ):
    language_model.Config(**TINY | dict(data_dir='.', lr=5e-4))


@pytest.mark.parametrize('cell', list(cells.CELLS))
def test_every_cell_takes_a_step_by_fptt(cell: str) -> None:
  """All parameters move, those of two layers of different widths."""
  config = language_model.Config(
    **TINY | dict(data_dir='.', cell=cell, layers=2, last_hidden=6, hidden=5)
  )
  trainer = optimizers.make_trainer(
    config,
    'fptt',
    language_model.make_model(config, 7),
    fptt_jax.losses.sequence_classification(7),
    10,
  )
  tokens = np.random.default_rng(0).integers(0, 7, (11, 4)).astype(np.int32)
  batch = fptt_jax.Batch(tokens[:-1], tokens[1:])
  state = trainer.init(jax.random.key(0), batch)
  before = jax.tree.map(np.array, state.params)
  state, _ = trainer.step(state, batch)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, state.params)
  assert min(jax.tree.leaves(moved)) > 0


def test_weights_of_cells_without_one_recurrent_matrix_are_not_dropped_out() -> None:
  """Refused where they are asked for."""
  with pytest.raises(
    ValueError,
    match=r'--weight_dropout must be .*, got 0\.1\.',
  ):
    language_model.Config(**TINY | dict(data_dir='.', cell='lru', weight_dropout=0.1))


def test_defaults_are_the_release_s_setting() -> None:
  """PTB-300 as the authors ran it: two-sided check against silent drift of the
  defaults.
  """
  config = dataclasses.asdict(language_model.Config(data_dir='folder'))
  expected = dict(
    seq_len=300, num_windows=6, hidden=256, embedding=256, batch_size=128, dropout=0.2
  )
  expected |= dict(
    alpha=0.5,
    beta=0.5,
    kappa=2.0,
    linear_scale=1.0,
    gradient_estimate='running',
    inner_steps=1,
  )
  expected |= dict(
    optimizer='sgd', lr=2.0, momentum=0.9, plateau_factor=4.0, clip=0.0, epochs=100
  )
  assert {name: config[name] for name in expected} == expected


def test_noise_and_penalties_of_a_language_model() -> None:
  """Each dropout changes the outputs in training, and penalties grow with their
  factors.
  """
  dropouts = (
    'dropout',
    'hidden_dropout',
    'input_dropout',
    'embedding_dropout',
    'latent_dropout',
    'weight_dropout',
  )
  settings: dict[str, Any] = dict.fromkeys(dropouts, 0.0) | dict(
    data_dir='.',
    task='text',
    seq_len=6,
    num_windows=2,
    layers=2,
    embedding=6,
    hidden=6,
    last_hidden=6,
    experts=2,
    tied=True,
    batch_size=3,
    locked=True,
    activation_penalty=0.0,
    temporal_penalty=0.0,
  )
  tokens = np.random.default_rng(0).integers(0, 7, (6, 3)).astype(np.int32)

  def run(**changes: float) -> Any:
    config = language_model.Config(**settings | changes)
    model = language_model.make_model(config, 7)
    apply = helpers.quick(
      lambda params, key: model.apply(
        params, model.initial_state(3), tokens, None, key
      )[1]
    )
    return apply(model.init(jax.random.key(0)), jax.random.key(1))

  plain = run()
  for name in dropouts:
    assert np.abs(run(**{name: 0.5}) - plain).max() > 1e-3, name
  for name in ('activation_penalty', 'temporal_penalty'):
    one, two = (run(**{name: factor}).penalty for factor in (1.0, 2.0))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-5)
    assert np.abs(one).max() > 1e-4, name
