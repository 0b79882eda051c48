"""Penn Treebank reading and the language-model script."""

import dataclasses
import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import language_model, ptb, runs
from experiments.options import UserError
import fptt_jax

TINY = dict(task='text', seq_len=10, num_windows=3, batch_size=4, embedding=8, hidden=8, epochs=3, lr=1.0)


def write_text(folder: Path) -> Path:
  """A text with a rule to learn: numbers in a cycle, a line each seven words."""
  words = [f'w{n % 5}' for n in range(420)]
  for split, count in (('train', 420), ('valid', 105), ('test', 70)):
    lines = [' ' + ' '.join(words[n : n + 7]) + ' \n' for n in range(0, count, 7)]
    (folder / f'ptb.{split}.txt').write_text(''.join(lines))
  return folder


def test_load_reads_tokens_in_order_with_an_end_of_line_each(tmp_path: Path) -> None:
  """Words split at blanks, '<eos>' ends each line, ids count up by first appearance; .gz files read the same."""
  text = ptb.load(write_text(tmp_path), check_hashes=False)
  assert text.vocabulary == ['w0', 'w1', 'w2', 'w3', 'w4', '<eos>']
  np.testing.assert_array_equal(text.train[:10], [0, 1, 2, 3, 4, 0, 1, 5, 2, 3])
  assert (len(text.train), len(text.valid), len(text.test)) == (480, 120, 80)
  for split in ptb.SPLITS:
    path = tmp_path / f'ptb.{split}.txt'
    (tmp_path / f'ptb.{split}.txt.gz').write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
  zipped = ptb.load(tmp_path, check_hashes=False)
  ptb.save(text, tmp_path / 'text.npz')
  for other in (zipped, ptb.load(tmp_path / 'text.npz', check_hashes=False)):
    assert ptb.fingerprint(other) == ptb.fingerprint(text)
    for mine, theirs in zip(text, other, strict=True):
      np.testing.assert_array_equal(mine, theirs)


def test_bad_text_files_are_named(tmp_path: Path) -> None:
  """Missing, not the original, truncated, not text, empty, unknown words, not an array file: one clear line each."""
  write_text(tmp_path)
  with pytest.raises(UserError, match=r'ptb\.train\.txt is not the original text: its sha256 is .*expected sha256 fcea919f'):
    ptb.load(tmp_path)
  (tmp_path / 'ptb.valid.txt').write_text('w0 stranger w1\n')
  with pytest.raises(UserError, match=r"1 words of the validation or test text are not in the training text: \['stranger'\]"):
    ptb.load(tmp_path, check_hashes=False)
  (tmp_path / 'ptb.valid.txt').write_bytes(b'w0 \xff w1')
  with pytest.raises(UserError, match=r'ptb\.valid\.txt cannot be read as text'):
    ptb.load(tmp_path, check_hashes=False)
  (tmp_path / 'ptb.valid.txt').write_text(' \n \n')
  with pytest.raises(UserError, match=r'ptb\.valid\.txt is empty'):
    ptb.load(tmp_path, check_hashes=False)
  (tmp_path / 'ptb.valid.txt').unlink()
  with pytest.raises(UserError, match=r'there is no ptb\.valid\.txt \(or ptb\.valid\.txt\.gz\) in '):
    ptb.load(tmp_path, check_hashes=False)
  (tmp_path / 'ptb.valid.txt.gz').write_bytes(gzip.compress(b'w0 w1\n' * 100)[:-12])
  with pytest.raises(UserError, match=r'ptb\.valid\.txt\.gz cannot be read as text'):
    ptb.load(tmp_path, check_hashes=False)
  damaged = bytearray(gzip.compress(b'w0 w1\n' * 100))
  damaged[12:20] = bytes(8)
  (tmp_path / 'ptb.valid.txt.gz').write_bytes(damaged)
  with pytest.raises(UserError, match=r'ptb\.valid\.txt\.gz cannot be read as text'):
    ptb.load(tmp_path, check_hashes=False)


def test_bad_array_files_are_named(tmp_path: Path) -> None:
  """Not an array file, empty, cut off, ids outside the vocabulary, another text where the original is asked for."""
  text = ptb.load(write_text(tmp_path), check_hashes=False)
  path = tmp_path / 'text.npz'
  ptb.save(text, path)
  with pytest.raises(UserError, match=r'train is not the original text: its sha256 is .*, expected sha256 fcea919f'):
    ptb.load(path)
  for content in (b'no zip', b'', path.read_bytes()[:300], b'PK' + path.read_bytes()[:100]):
    (tmp_path / 'bad.npz').write_bytes(content)
    with pytest.raises(UserError, match=r'bad\.npz is not an array file'):
      ptb.load(tmp_path / 'bad.npz', check_hashes=False)
  ptb.save(text._replace(valid=text.valid + 1), path)
  with pytest.raises(UserError, match=r'valid holds ids 1\.\.6 for a vocabulary of 6'):
    ptb.load(path, check_hashes=False)
  ptb.save(text._replace(test=text.test[None]), path)
  with pytest.raises(UserError, match=r'test must be int32 token ids \[N\], got int32\[1, 80\]'):
    ptb.load(path, check_hashes=False)


def test_real_penn_treebank() -> None:
  """The original files give the counts every paper quotes."""
  folder = Path(os.environ.get('FPTT_JAX_DATA', '')) / 'ptb'
  if 'FPTT_JAX_DATA' not in os.environ or not folder.is_dir():
    pytest.skip('real data: set FPTT_JAX_DATA to a folder with ptb/ptb.{train,valid,test}.txt(.gz)')
  text = ptb.load(folder)
  assert (len(text.train), len(text.valid), len(text.test), len(text.vocabulary)) == (929_589, 73_760, 82_430, 10_000)


@pytest.mark.parametrize('length', [9, 61, 80, 83])
def test_sequences_cover_each_stream_once(length: int) -> None:
  """Row b of the batches, put end to end without the padding, is stream b; targets are the inputs one word on."""
  tokens, batch_size, seq_len = np.arange(length, dtype=np.int32), 4, 10
  batches = list(language_model.sequences(tokens, seq_len, batch_size))
  stream = length // batch_size
  rows: list[list[int]] = [[] for _ in range(batch_size)]
  for batch in batches:
    assert batch.inputs.shape == batch.targets.shape == (seq_len, batch_size)
    lengths = batch.lengths if batch.lengths is not None else np.full(batch_size, seq_len)
    for b in range(batch_size):
      np.testing.assert_array_equal(batch.targets[: lengths[b], b], batch.inputs[: lengths[b], b] + 1)
      rows[b] += batch.inputs[: lengths[b], b].tolist()
  for b in range(batch_size):
    assert rows[b] == list(range(b * stream, (b + 1) * stream - 1))
  with pytest.raises(UserError, match='too short for 4 parallel streams'):
    list(language_model.sequences(tokens[:7], seq_len, batch_size))


def test_perplexity_is_that_of_the_whole_text_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
  """Cut into pieces with the hidden state carried on, or read at once: the same number; a constant model has perplexity V."""
  config = language_model.Config(data_dir='.', **TINY)
  model = language_model.make_model(config, 6)
  trainer = fptt_jax.trainer(model, fptt_jax.losses.sequence_classification(6), language_model.optax.sgd(0.1))
  params = model.init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 6, 101).astype(np.int32)
  monkeypatch.setattr(language_model, 'EVALUATION_STEPS', 16)
  pieces = language_model.perplexity(trainer, params, tokens)
  _, logits = model.apply(params, model.initial_state(1), jnp.asarray(tokens[:-1, None]), None, None)
  nll = -jax.nn.log_softmax(logits[:, 0])[jnp.arange(100), tokens[1:]]
  assert pieces == pytest.approx(math.exp(nll.mean()), rel=1e-5)
  zero = jax.tree.map(jnp.zeros_like, params)
  assert language_model.perplexity(trainer, zero, tokens) == pytest.approx(6.0, rel=1e-5)


def test_script_learns_a_text_and_writes_its_folder(tmp_path: Path) -> None:
  """On a text with a rule validation perplexity falls far below the vocabulary's size; test is measured at the best epoch."""
  config = language_model.Config(
    data_dir=str(write_text(tmp_path)), method=('fptt', 'tbptt'), workdir=str(tmp_path / 'run'), **{**TINY, 'epochs': 6}
  )
  language_model.main(config)
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  for run in summary['runs']:
    rows = runs.read_jsonl(tmp_path / 'run' / f'{run["method"]}-seed0' / 'metrics.jsonl')
    assert run['valid_ppl'] == min(row['valid_ppl'] for row in rows) < 3.5
    assert run['best_epoch'] == min(rows, key=lambda row: row['valid_ppl'])['step']
    assert run['test_ppl'] < 3.5
    assert [row['updates'] for row in rows] == [36 * epoch for epoch in range(1, 7)]  # 11 sequences of 3, one with 9 of 10 steps
    assert run['parameters'] == 6 * 8 + (4 * 8 * 17) + 8 * 6 + 6
  assert (tmp_path / 'run' / 'perplexity.png').stat().st_size > 10_000


def test_learning_rate_falls_on_a_plateau_and_training_stops_below_the_least(tmp_path: Path) -> None:
  """At a learning rate that cannot improve, each epoch divides it, until it is below --min_lr."""
  text = ptb.load(write_text(tmp_path), check_hashes=False)
  settings = {**TINY, 'epochs': 9, 'lr': 1e-30, 'dropout': 0.0, 'min_lr': 1e-31, 'plateau_factor': 4.0}
  config = language_model.Config(data_dir=str(tmp_path), **settings)
  summary = language_model.train(config, text, 'tbptt', 0, tmp_path / 'run')
  rows = runs.read_jsonl(tmp_path / 'run' / 'tbptt-seed0' / 'metrics.jsonl')
  np.testing.assert_allclose([row['lr'] for row in rows], [1e-30, 1e-30, 2.5e-31], rtol=1e-6)
  assert (summary['epochs'], summary['best_epoch']) == (3, 1)


def test_interrupted_run_resumes_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Stopped after an epoch's metrics and before its checkpoint, a run goes on to the metrics of one never stopped; with dropout,
  restart of the recursion, evaluation at the summary."""
  text = ptb.load(write_text(tmp_path), check_hashes=False)
  config = language_model.Config(data_dir=str(tmp_path), restart=True, evaluate_at='w_bar', **TINY)
  whole = language_model.train(config, text, 'fptt', 1, tmp_path / 'whole')
  save = runs.Run.save

  def interrupted_save(self: runs.Run, step: int, carry: Any, **record: Any) -> None:
    if step == 2:
      self.close()
      raise KeyboardInterrupt
    save(self, step, carry, **record)

  monkeypatch.setattr(runs.Run, 'save', interrupted_save)
  with pytest.raises(KeyboardInterrupt):
    language_model.train(config, text, 'fptt', 1, tmp_path / 'cut')
  monkeypatch.undo()
  resumed = language_model.train(config, text, 'fptt', 1, tmp_path / 'cut')
  assert {**resumed, 'seconds': 0} == {**whole, 'seconds': 0}
  files = [tmp_path / name / 'fptt-seed1' / 'metrics.jsonl' for name in ('whole', 'cut')]
  curves = [[{**row, 'seconds': 0} for row in runs.read_jsonl(file)] for file in files]
  assert curves[0] == curves[1]


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(data_dir=''), '--data_dir must be a folder with the text files .*simple-examples'),
    (dict(method=('fptt', 'tbptt_final')), '--method must be without tbptt_final, which takes no padded'),
    (dict(dropout=1.0), r'--dropout must be in \[0, 1\), got 1.0'),
    (dict(epochs=0), '--epochs must be at least 1, got 0'),
    (dict(plateau_factor=0.5), '--plateau_factor must be at least 1, got 0.5'),
    (dict(num_windows=301), 'num_windows must be an integer between 1 and the sequence length T=300, got 301'),
  ],
)
def test_settings_of_no_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
  """As for the adding problem."""
  with pytest.raises(ValueError, match=message):
    language_model.Config(**{'data_dir': 'folder', **settings})


def test_divergence_is_said_and_nothing_of_it_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  """At an absurd learning rate the run stops with a word; metrics are valid JSON; the same command again ends the same way."""
  config = language_model.Config(
    data_dir=str(write_text(tmp_path)), method=('tbptt',), workdir=str(tmp_path / 'run'), **{**TINY, 'lr': 1e30}
  )
  for _ in range(2):
    language_model.main(config)
    assert 'epoch   1  diverged' in capsys.readouterr().out
    [row] = runs.read_jsonl(tmp_path / 'run' / 'tbptt-seed0' / 'metrics.jsonl')
    assert row['train_ppl'] is None
    [summary] = json.loads((tmp_path / 'run' / 'summary.json').read_text())['runs']
    assert (summary['valid_ppl'], summary['test_ppl']) == (None, None)


def test_defaults_are_the_release_s_setting() -> None:
  """PTB-300 as the authors ran it: two-sided check against silent drift of the defaults."""
  config = dataclasses.asdict(language_model.Config(data_dir='folder'))
  expected = dict(seq_len=300, num_windows=6, hidden=256, embedding=256, batch_size=128, dropout=0.2)
  expected |= dict(alpha=0.5, beta=0.5, kappa=2.0, rho=0.0, correction='eq6', gradient_estimate='running', inner_steps=1)
  expected |= dict(optimizer='sgd', lr=2.0, momentum=0.9, plateau_factor=4.0, clip=0.0)
  assert {name: config[name] for name in expected} == expected
