"""Cutting trees over devices, gathering them, taking means."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from fptt_jax.parallel import _collectives, _specs

N = 4
MESH = jax.sharding.Mesh(jax.devices('cpu')[:N], ('devices',))
RNG = np.random.default_rng(0)
TREE = {
  'first': RNG.normal(size=(8, 3)).astype(np.float32),
  'second': RNG.normal(size=(3, 8, 2)).astype(np.float32),
  'half': RNG.normal(size=(2, 4)).astype(jnp.bfloat16),
  'wide': RNG.normal(size=(5, 12, 4)).astype(np.float32),
  'whole': RNG.normal(size=(3, 5)).astype(np.float32),
  'scalar': np.float32(2),
  'none': None,
}
SPECS = {
  'first': PartitionSpec('devices'),
  'second': PartitionSpec(None, 'devices'),
  'half': PartitionSpec(None, 'devices'),
  'wide': PartitionSpec(None, 'devices'),
  'whole': PartitionSpec(),
  'scalar': PartitionSpec(),
  'none': None,
}


def on_devices(function, in_specs, out_specs):
  return jax.jit(
    jax.shard_map(
      function, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
  )


def assert_equal(got, expected):
  assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(
    lambda x: x.dtype, expected
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-6),
    got,
    expected,
  )


def test_where_leaves_are_cut():
  assert _specs.shard_specs(TREE, MESH) == SPECS
  assert _specs.shard_specs(np.ones((0, 3)), MESH) == PartitionSpec()


@pytest.mark.parametrize('joined', [0, 50, 4096])
def test_shards_are_gathered(monkeypatch, joined):
  """All by themselves, some or all joined: each device has the whole, of the dtypes
  there were.
  """
  monkeypatch.setattr(_collectives, 'MAX_JOINED', joined)
  assert_equal(
    on_devices(
      lambda t: _collectives.gather_shards(t, SPECS, 'devices'),
      (SPECS,),
      PartitionSpec(),
    )(TREE),
    TREE,
  )


@pytest.mark.parametrize('joined', [0, 50, 4096])
def test_shards_of_the_mean(monkeypatch, joined):
  """Device d has the tree times 2^d; what is cut and what is left whole come out as
  their mean over the devices.
  """
  monkeypatch.setattr(_collectives, 'MAX_JOINED', joined)

  def run(tree):
    mine = jax.tree.map(
      lambda x: x * jnp.asarray(2 ** jax.lax.axis_index('devices'), x.dtype), tree
    )
    return _collectives.mean_over_devices(mine, SPECS, 'devices')

  got = on_devices(run, (PartitionSpec(),), SPECS)(TREE)
  assert_equal(
    got, jax.tree.map(lambda x: (np.float32(x) * 3.75).astype(x.dtype), TREE)
  )
  assert got['second'].addressable_shards[0].data.shape == (3, 2, 2)


def test_placing_keys():
  """A PRNG key is one afterwards."""
  key = jax.random.key(3)
  placed = _specs.place(
    {'key': key, 'x': np.ones(4)},
    {'key': PartitionSpec(), 'x': PartitionSpec('devices')},
    MESH,
  )
  assert placed['key'].dtype == key.dtype
  assert placed['key'].sharding.is_fully_replicated
  assert (
    jax.random.key_data(placed['key']).tolist() == jax.random.key_data(key).tolist()
  )
  assert placed['x'].addressable_shards[0].data.shape == (1,)
