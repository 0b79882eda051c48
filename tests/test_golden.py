"""Recorded runs come out the same, bit for bit."""

import json
import os

from golden import cases
import helpers
import numpy as np
import pytest

RECORDED = json.loads((cases.FOLDER / 'records.json').read_text())


def same_machine() -> bool:
  """Returns whether programs round here as where the cases were recorded."""
  flags = os.environ.get('XLA_FLAGS') == helpers.QUICK_FLAGS
  return flags and cases.machine() == RECORDED['machine']


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('name', cases.CASES)
def test_recorded_run_comes_out_the_same(name: str, dtype: str) -> None:
  """Digest, traces, temporary memory and collectives; elsewhere numbers to 1e-6."""
  expected = RECORDED['cases'][f'{name}-{dtype}']
  with helpers.default_float64(dtype == 'float64'):
    record, arrays = cases.run(cases.CASES[name], dtype)
  if same_machine():
    assert record == expected
    return
  assert record['traces'] == expected['traces']
  if dtype == 'float32':
    with np.load(cases.FOLDER / 'arrays.npz') as stored:
      found = np.concatenate([np.float32(array) for array in arrays])
      np.testing.assert_allclose(found, stored[f'{name}-{dtype}'], rtol=1e-4, atol=1e-6)
