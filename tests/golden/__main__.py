"""Records what the cases give on this machine."""

import json
import os
import sys

sys.path.insert(0, 'tests')
import helpers

os.environ['XLA_FLAGS'] = helpers.QUICK_FLAGS

import jax
import numpy as np

from tests.golden import cases


def main() -> None:
  """Writes records.json and arrays.npz."""
  jax.config.update('jax_num_cpu_devices', 8)
  records, arrays = {}, {}
  for dtype in ('float32', 'float64'):
    with helpers.default_float64(dtype == 'float64'):
      for name, case in cases.CASES.items():
        key = f'{name}-{dtype}'
        records[key], found = cases.run(case, dtype)
        arrays[key] = np.concatenate([np.asarray(array, dtype) for array in found])
        print(key, records[key]['digest'][:12])
  described = {'machine': cases.machine(), 'cases': records}
  text = json.dumps(described, indent=1, sort_keys=True)
  (cases.FOLDER / 'records.json').write_text(text + '\n')
  np.savez_compressed(cases.FOLDER / 'arrays.npz', **arrays)


if __name__ == '__main__':
  main()
