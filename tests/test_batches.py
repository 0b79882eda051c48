"""Inputs that are trees, and batches whose first axis is the batch's."""

from flax import nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import Batch, losses, nn

T, B = 7, 4


class Merge(nnx.Module):
  """Embeds tokens and appends features."""

  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Embed(5, 2, rngs=rngs)

  def __call__(self, x):
    return jnp.concatenate([self.embed(x['tokens']), x['features']], axis=-1)


def model() -> fptt_jax.Model:
  return nn.from_nnx(
    lambda r: nn.Sequential(Merge(r), nn.GRU(3, 4, rngs=r), nnx.Linear(4, 3, rngs=r))
  )


def tree_batch(sequence: bool) -> Batch:
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 5, (T, B)).astype(np.int32)
  features = rng.normal(size=(T, B, 1)).astype(np.float32)
  targets = rng.integers(0, 3, (T, B) if sequence else B).astype(np.int32)
  return Batch(
    {'tokens': tokens, 'features': features}, targets, np.array([7, 2, 5, 6])
  )


class Joined(nnx.Module):
  """The same model's first layer for tokens and features side by side in one array."""

  def __init__(self, rngs: nnx.Rngs):
    self.merge = Merge(rngs)

  def __call__(self, x):
    return self.merge({'tokens': x[..., 0].astype(jnp.int32), 'features': x[..., 1:]})


@pytest.mark.parametrize('sequence', [False, True])
@pytest.mark.parametrize('method', ['fptt', 'tbptt_final'])
def test_a_tree_gives_what_one_array_gives(sequence, method):
  """Tokens and features as a dict train and evaluate as the two packed into one array
  do.
  """
  batch = tree_batch(sequence)
  if method == 'tbptt_final':
    batch = batch._replace(lengths=None)
  packed = np.concatenate(
    [batch.inputs['tokens'][..., None], batch.inputs['features']], -1
  )
  loss = (
    losses.sequence_classification(3) if sequence else losses.terminal_classification(3)
  )
  optimizer = fptt_jax.fptt(optax.sgd(0.1)) if method == 'fptt' else optax.sgd(0.1)
  options = {'truncation_steps': 3} if method == 'tbptt_final' else {'num_windows': 3}
  joined = nn.from_nnx(
    lambda r: nn.Sequential(Joined(r), nn.GRU(3, 4, rngs=r), nnx.Linear(4, 3, rngs=r))
  )
  results = []
  for used, inputs in ((model(), batch.inputs), (joined, packed.astype(np.float32))):
    trainer = helpers.quick_trainer(used, loss, optimizer, method=method, **options)
    given = batch._replace(inputs=inputs)
    fptt_jax.validate_batch(given, loss)
    state, metrics = trainer.step(trainer.init(jax.random.key(0), given), given)
    totals, _ = trainer.evaluate(state.params, given)
    results.append((jax.tree.leaves(state.params), metrics, totals))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results
  )


@pytest.mark.parametrize('shard_params', [False, True])
def test_a_tree_under_a_mesh(shard_params):
  """Each array of the tree is split by rows; `make_global_batch` puts them there."""
  mesh = jax.sharding.Mesh(jax.devices()[:2], ('batch',))
  loss, batch = losses.sequence_classification(3), tree_batch(True)
  losses_seen = []
  for options in ({}, {'mesh': mesh, 'shard_params': shard_params}):
    trainer = fptt_jax.make_trainer(
      model(), loss, fptt_jax.fptt(optax.sgd(0.1)), num_windows=3, **options
    )
    given = fptt_jax.make_global_batch(batch, loss, mesh) if options else batch
    _, metrics = trainer.step(trainer.init(jax.random.key(0), given), given)
    losses_seen.append(np.asarray(metrics.loss))
  np.testing.assert_allclose(*losses_seen, rtol=2e-5)


def test_a_tree_in_populations_and_compiled_epochs():
  """`population` with a batch for each member and `scan_train_steps` take trees as they
  come.
  """
  batch = tree_batch(True)
  loss = losses.sequence_classification(3)
  trainer = fptt_jax.make_trainer(
    model(), loss, fptt_jax.fptt(optax.sgd(0.1)), num_windows=3
  )
  two = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
  many = fptt_jax.vmap_trainer(trainer, own_batches=True)
  keys = jnp.stack([jax.random.key(0)] * 2)
  _, metrics = many.step(many.init(keys, two), two)
  _, alone = trainer.step(trainer.init(jax.random.key(0), batch), batch)
  np.testing.assert_allclose(metrics.loss[1], alone.loss, rtol=1e-5)
  epoch = fptt_jax.scan_train_steps(trainer)
  _, scanned = epoch(trainer.init(jax.random.key(0), batch), None, two)
  np.testing.assert_allclose(scanned.loss[0], alone.loss, rtol=1e-5)


def test_a_model_that_is_all_readout_takes_a_tree():
  """A stack whose layers all act on single steps has its inputs as features: they may
  be a tree.
  """
  stateless = fptt_jax.Model(
    lambda key: {'w': jnp.zeros((1, 3))},
    lambda batch_size: jnp.zeros((batch_size, 1)),
    lambda p, s, x, mask, key: (s, x['features'] @ p['w']),
  )
  split = fptt_jax.FeaturesAndReadout(
    lambda p, s, x, mask, key: (s, x), lambda p, x, key: x['features'] @ p['w']
  )
  loss = losses.sequence_classification(3)
  for used in (stateless, stateless._replace(split=split)):
    trainer = helpers.quick_trainer(
      used, loss, optax.sgd(0.1), method='tbptt', num_windows=3
    )
    batch = tree_batch(True)
    _, metrics = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    assert np.isfinite(metrics.loss).all()


@pytest.mark.parametrize(
  ('inputs', 'error', 'message'),
  [
    ({}, ValueError, r'inputs .*\{\}'),
    ((np.zeros((T, B)), np.zeros((T, B + 1))), ValueError, r'inputs\[1\].*\(7, 5\)'),
    ((np.zeros((T, B)), np.zeros((T + 1, B))), ValueError, r'inputs\[1\].*\(8, 4\)'),
    ({'a': np.zeros((T, B), complex)}, TypeError, r"inputs\['a'\].*complex128"),
    ({'a': np.zeros(T)}, ValueError, r"inputs\['a'\].*\(7,\)"),
    ({'a': np.zeros((T, B)), 'b': 1.0}, TypeError, r"inputs\['b'\].*float"),
  ],
)
def test_trees_that_do_not_fit_are_refused_by_name(inputs, error, message):
  trainer = fptt_jax.make_trainer(
    model(), losses.sequence_classification(3), fptt_jax.fptt(optax.sgd(0.1))
  )
  with pytest.raises(error, match=message):
    trainer.init(jax.random.key(0), Batch(inputs, np.zeros((T, B), np.int32)))


def test_check_batch_names_the_array_of_a_tree():
  batch = tree_batch(True)
  features = batch.inputs['features'].copy()
  features[6, 1] = np.nan  # Past the end of row 1.
  fptt_jax.validate_batch(
    batch._replace(inputs={**batch.inputs, 'features': features}),
    losses.sequence_classification(3),
  )
  features[1, 1] = np.inf
  with pytest.raises(ValueError, match=r"inputs\['features'\].*\(1, 1\)"):
    fptt_jax.validate_batch(
      batch._replace(inputs={**batch.inputs, 'features': features}),
      losses.sequence_classification(3),
    )


def test_from_batch_major_exchanges_the_first_two_axes():
  """Of inputs, trees of them, masks, and targets that have time; [B] and [B, O]
  stay.
  """
  batch = tree_batch(True)
  back = lambda tree: jax.tree.map(lambda x: np.swapaxes(x, 0, 1), tree)
  mask = np.random.default_rng(1).random((T, B)) < 0.5
  made = Batch.from_batch_major(
    back(batch.inputs),
    back(batch.targets),
    batch.lengths,
    mask.T,
    targets_have_time=True,
  )
  jax.tree.map(np.testing.assert_array_equal, made, batch._replace(mask=mask))
  x = jnp.zeros((B, T, 2))
  for targets in (np.zeros(B), jnp.zeros((B, 3)), (np.zeros(B, int), np.zeros(B, int))):
    made = Batch.from_batch_major(x, targets)
    assert made.inputs.shape == (T, B, 2)
    assert made.targets is targets
  same = np.zeros((B, T))
  assert Batch.from_batch_major(x, same, targets_have_time=False).targets is same
  assert np.shares_memory(
    Batch.from_batch_major(np.zeros((B, T, 1)), same, targets_have_time=True).targets,
    same,
  )


@pytest.mark.parametrize(
  ('arguments', 'error', 'message'),
  [
    ({'targets': np.zeros((B, T))}, ValueError, r'targets_have_time .*\(4, 7\).*None'),
    ({'targets': np.zeros((B, T, 1))}, ValueError, r'targets_have_time .*None'),
    (
      {'targets': np.zeros((T, B)), 'targets_have_time': True},
      ValueError,
      r'targets .*\(7, 4\)',
    ),
    (
      {'targets': np.zeros(B), 'targets_have_time': True},
      ValueError,
      r'targets .*\(4,\)',
    ),
    (
      {'targets': np.zeros(B), 'mask': np.zeros((T, B), bool)},
      ValueError,
      r'mask .*\[7, 4\]',
    ),
    ({'targets': np.zeros(B), 'inputs': np.zeros(B)}, ValueError, r'inputs .*\(4,\)'),
    ({'targets': 3}, TypeError, 'targets'),
  ],
)
def test_from_batch_major_does_not_guess(arguments, error, message):
  with pytest.raises(error, match=message):
    Batch.from_batch_major(**{'inputs': np.zeros((B, T, 1)), **arguments})
