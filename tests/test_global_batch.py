"""Several processes, each with devices and rows of its own, against one that has as
many.
"""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import peer
import pytest

import fptt_jax

TESTS = Path(__file__).parent


@contextlib.contextmanager
def two_processes(
  folder: Path, devices: int, *arguments: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
  """Two that have trained and go on; they are gone afterwards, whatever happens."""
  environment = os.environ | {'PYTHONPATH': str(TESTS.parent), 'JAX_PLATFORMS': 'cpu'}
  running = []
  with (
    socket.socket() as holder
  ):  # Bound as long as they run, so that nobody else is given the port.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(('127.0.0.1', 0))
    try:
      for number in '01':
        command = [
          sys.executable,
          TESTS / 'peer.py',
          str(holder.getsockname()[1]),
          number,
          '2',
          str(devices),
          folder,
          *arguments,
        ]
        with (folder / f'{number}.log').open('w') as log:
          running.append(
            subprocess.Popen(
              command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
          )
      deadline = time.monotonic() + 240
      while not all((folder / f'{number}.npz').exists() for number in '01'):
        if time.monotonic() > deadline or any(
          one.poll() is not None for one in running
        ):
          pytest.fail(
            '\n'.join((folder / f'{number}.log').read_text()[-2000:] for number in '01')
          )
        time.sleep(0.1)
      yield running
    finally:
      for one in running:
        one.kill()
        one.wait()


def assert_ends(survivor: subprocess.Popen[bytes], log: Path) -> None:
  """With an error, that says so, within a minute."""
  assert survivor.wait(60) != 0
  assert any(
    words in log.read_text()
    for words in ('JaxRuntimeError', 'JAX distributed service detected fatal errors')
  )


def assert_same(folder: Path, devices: int, tolerance: float, *arguments: str) -> None:
  """Both processes have what one has that trains on as many devices."""
  expected = peer.train(
    jax.sharding.Mesh(jax.devices('cpu')[:devices], ('batch',)), 0, 1, *arguments
  )
  for number in '01':
    with np.load(folder / f'{number}.npz') as found:
      assert found.keys() == expected.keys()
      for name, value in expected.items():
        np.testing.assert_allclose(
          found[name], value, rtol=tolerance, atol=tolerance, err_msg=name
        )


def test_two_processes(tmp_path):
  """With a device each they train what one process trains on two, bit for bit. One is
  killed: the other ends with an error.
  """
  with two_processes(tmp_path, 1) as (survivor, killed):
    killed.kill()
    assert_ends(survivor, tmp_path / '0.log')
  assert_same(tmp_path, 2, 0)


@pytest.mark.slow
def test_eight_devices(tmp_path):
  """Four each, whose sums come in another order; states go through checkpoints."""
  with two_processes(tmp_path, 4, str(tmp_path / 'several')):
    pass
  assert_same(tmp_path, 8, 1e-5, str(tmp_path / 'one'))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('victim', 'how'), [(0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP)]
)
def test_survivors_end(tmp_path, victim, how):
  """Whether the first process or the second dies or hangs."""
  with two_processes(tmp_path, 1) as running:
    running[victim].send_signal(how)
    assert_ends(running[1 - victim], tmp_path / f'{1 - victim}.log')


def test_rows_that_do_not_fit_are_refused():
  mesh = jax.sharding.Mesh(jax.devices('cpu')[:3], ('batch',))
  with pytest.raises(
    ValueError,
    match=r"a process's rows must be a multiple of the 3 devices .*, got 16\.",
  ):
    fptt_jax.make_global_batch(peer.BATCHES[0], peer.LOSS, mesh)
  with pytest.raises(TypeError, match=r'batch must be of type fptt_jax\.Batch'):
    fptt_jax.make_global_batch(peer.BATCHES[0].inputs, peer.LOSS, mesh)
