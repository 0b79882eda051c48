"""The command line: what is wrong with it is said in one line, with what was meant."""

import dataclasses
import io
import os
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

import absl.flags
import pytest

from experiments import add_task, images, language_model
from experiments.core import flags


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> absl.flags.FlagValues:
  """A registry of flags of the test's own."""
  own = absl.flags.FlagValues()
  monkeypatch.setattr(absl.flags, 'FLAGS', own)
  monkeypatch.setattr(flags.flags, 'FLAGS', own)
  for name in ('integer', 'float', 'string', 'bool', 'enum', 'list'):
    define = getattr(absl.flags, f'DEFINE_{name}')
    bound = lambda *args, define=define, **kwargs: define(
      *args, flag_values=own, **kwargs
    )
    monkeypatch.setattr(flags.flags, f'DEFINE_{name}', bound)
  return own


def refusal(config_class: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
  """What a script says of its arguments, in one line."""
  argv = ['add_task.py', *arguments]
  monkeypatch.setattr(sys, 'argv', argv)
  ran: list[Any] = []
  monkeypatch.setattr(
    flags.app, 'run', lambda main, flags_parser: main(flags_parser(argv))
  )
  with pytest.raises(SystemExit) as caught:
    flags.run(ran.append, config_class)
  assert not ran
  text = str(
    caught.value.code
  )  # A text as the code: the process prints it and ends with 1.
  assert text.startswith('error: ')
  assert '\n' not in text
  assert len(text) < 300
  return text


@pytest.mark.usefixtures('values')
@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['foo'], ["'foo'"]),
    (['foo', 'bar', '--lr=1'], ["'foo'"]),
    (['x' * 1000], ['xxx...']),
    (['lr=3'], ["'lr=3'", '--lr=3']),
    (['--decay', 'false'], ["'false'", '--decay=false', '--nodecay']),
    (['--method', 'fptt', 'tbptt'], ["'tbptt'", 'commas']),
    (['--lr=1e-3:3e-4'], ["'1e-3:3e-4'", '--grid=lr=1e-3:3e-4']),
    (['--lr=0.1,0.2'], ["'0.1,0.2'", '--grid=lr=0.1:0.2']),
    (['--alpha', '0.1, 0.2'], ['--grid=alpha=0.1:0.2']),
    (['--beta=[0.1,0.2]'], ['--grid=beta=0.1:0.2']),
    (['--hidden=8,16'], ['--hidden', "'8,16'", 'one value']),
    (['--hidden=many'], ['--hidden', "'many'", 'an integer']),
    (['--lr=fast'], ['--lr', "'fast'", 'a number']),
    (['--lr='], ['--lr', "''"]),
    (['--lr'], ['lr']),
    (['--gradient_estimate=runing'], ["'runing'", 'running']),
    (['--lrr=2'], ['--lrr', '--lr?']),
    (['--hiden=3'], ['--hiden', '--hidden?']),
    (['--nodecya'], ['--nodecya', '--nodecay?']),
    (['--learning_rate=3'], ['--learning_rate', '--lr?']),
    (['--seq-len=3'], ['--seq-len', '--seq_len?']),
    (['--steps=3'], ['--steps', '--']),
  ],
)
def test_a_slip_is_said_in_one_line(
  arguments: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  """With the word and, where it can be told, what was meant."""
  text = refusal(add_task.Config, monkeypatch, *arguments)
  for part in expected:
    assert part in text


@pytest.mark.usefixtures('values')
@pytest.mark.parametrize('config_class', [images.Config, language_model.Config])
def test_the_other_scripts_say_it_too(
  config_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The flags are their own."""
  assert '--grid=kappa=1:2' in refusal(config_class, monkeypatch, '--kappa=1,2')


@pytest.mark.usefixtures('values')
@pytest.mark.parametrize(
  'config_class', [add_task.Config, images.Config, language_model.Config]
)
def test_help_lists_every_flag_once_in_its_group(
  config_class: Any,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  """The scripts' flags are six lists; each line fits a page of 88 columns."""
  argv = ['script.py', '--help']
  monkeypatch.setattr(sys, 'argv', argv)
  monkeypatch.setattr(
    flags.app, 'run', lambda main, flags_parser: main(flags_parser(argv))
  )
  with pytest.raises(SystemExit) as caught:
    flags.run(lambda config: None, config_class)
  assert caught.value.code == 0
  shown = capsys.readouterr().out
  headers = re.findall(r'^(\w+) flags:$', shown, re.MULTILINE)
  assert headers == ['Task', 'Model', 'Optimizer', 'Training', 'Run', 'Devices']
  listed = re.findall(r'^  --(\w+)=', shown, re.MULTILINE)
  names = [field.name for field in dataclasses.fields(config_class)]
  assert sorted(listed) == sorted(names)
  assert all(len(line) <= 88 or ' ' not in line.strip() for line in shown.splitlines())


def test_letters_that_a_terminal_lacks_are_escaped(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """On both streams; of folder names in bytes of no encoding, too."""
  streams = {
    name: io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    for name in ('stdout', 'stderr')
  }
  for name, stream in streams.items():
    monkeypatch.setattr(sys, name, stream)
  flags._show_any_letter()
  for stream in streams.values():
    print('Köln λ \udcff', file=stream, flush=True)
    assert stream.buffer.getvalue() == b'K\\xf6ln \\u03bb \\udcff\n'


def test_a_script_ends_with_one_line(tmp_path: Path) -> None:
  """A real one, in a terminal without any letters but ASCII's: its exit code, and
  nothing on standard output.
  """
  command = [
    sys.executable,
    '-m',
    'experiments.language_model',
    '--task=text',
    f'--data_dir={tmp_path / "Köln"}',
  ]
  environment = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
  ended = subprocess.run(
    command,
    capture_output=True,
    env=environment,
    check=False,
    cwd=Path(__file__).parents[1],
  )
  assert (ended.returncode, ended.stdout) == (1, b'')
  [line] = ended.stderr.splitlines()
  assert line.startswith(b'error: cannot read --data_dir=')
  assert b'K\\xf6ln' in line
