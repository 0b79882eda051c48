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
  """Digest, traces, temporary memory and collectives; elsewhere traces and numbers, and
  collectives where the jaxlib is the same.
  """
  expected = RECORDED['cases'][f'{name}-{dtype}']
  with helpers.default_float64(dtype == 'float64'):
    record, arrays = cases.run(cases.CASES[name], dtype)
  if same_machine():
    assert record == expected
    return
  assert record['traces'] == expected['traces']
  if cases.machine()['jaxlib'] == RECORDED['machine']['jaxlib']:
    assert record['collectives'] == expected['collectives']
  tolerances = {'float32': (1e-4, 1e-6), 'float64': (1e-9, 1e-12)}
  rtol, atol = tolerances[dtype]
  with np.load(cases.FOLDER / 'arrays.npz') as stored:
    found = np.concatenate([np.asarray(array, dtype) for array in arrays])
    np.testing.assert_allclose(found, stored[f'{name}-{dtype}'], rtol=rtol, atol=atol)
