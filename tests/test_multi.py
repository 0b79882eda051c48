"""Many steps in one program, many members side by side: the numbers are those of a
step, and of a member, alone.
"""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import losses

T, B, N = 7, 4, 6
KEYS = jax.random.split(jax.random.key(0), 4)


@optax.inject_hyperparams
def injected(learning_rate, alpha, beta, kappa, clip):
  """All that members of a population may differ in."""
  base = optax.chain(
    optax.clip_by_global_norm(clip), optax.sgd(learning_rate, momentum=0.9)
  )
  return fptt_jax.fptt(base, alpha=alpha, beta=beta, kappa=kappa)


PLAIN = dict(learning_rate=0.1, alpha=0.5, beta=0.4, kappa=1.0, clip=1.0)


def mesh_of(number):
  return jax.sharding.Mesh(jax.devices('cpu')[:number], ('members',))


def make(method='fptt', optimizer=None, dtype=jnp.float64, **options):
  if optimizer is None:
    optimizer = injected(**PLAIN) if method == 'fptt' else optax.sgd(0.1)
  if fptt_jax.METHODS[method].num_windows is None:
    options = {'num_windows': 3} | options
  return fptt_jax.make_trainer(
    helpers.elman(dtype=dtype),
    losses.terminal_regression(),
    optimizer,
    method=method,
    **options,
  )


def data(dtype=np.float64, seed=0):
  batches = [
    helpers.regression_batch(T, B, seed=seed + n, dtype=dtype) for n in range(N)
  ]
  return batches, jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def plain(tree):
  """Without PRNG keys, which compare as their data."""
  return jax.tree.map(
    lambda x: (
      jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    ),
    tree,
  )


def assert_same(got, expected, tolerance=1e-12):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
    plain(got),
    plain(expected),
  )


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('carry_hidden', [False, True])
def test_scan_equals_calls(carry_hidden):
  """States and metrics of N steps in one program are those of N calls."""
  trainer, run = (
    helpers.quickened(make(carry_hidden=carry_hidden)),
    helpers.quick(fptt_jax.scan_train_steps(make(carry_hidden=carry_hidden))),
  )
  batches, stacked = data()
  state, seen = trainer.init(jax.random.key(1), batches[0]), []
  for batch in batches:
    state, metrics = trainer.step(state, batch)
    seen.append(metrics)
  got = run(trainer.init(jax.random.key(1), batches[0]), (), stacked)
  assert_same(got, (state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)))


@pytest.mark.usefixtures('x64')
def test_a_scan_takes_batches_of_another_size_than_the_state():
  """As calls do, where no hidden state is carried on."""
  trainer = make(donate=False)
  few, _ = data()
  many = fptt_jax.Batch(
    np.concatenate([few[0].inputs, few[1].inputs], 1),
    np.concatenate([few[0].targets, few[1].targets]),
  )
  items = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), many)
  state = trainer.init(jax.random.key(1), few[0])
  expected = state
  for _ in range(2):
    expected, _ = trainer.step(expected, many)
  got, _ = fptt_jax.scan_train_steps(trainer)(state, (), items)
  assert_same(got, expected)


@pytest.mark.usefixtures('x64')
def test_read_from_a_resident_source():
  """Bytes on the device, gathered and scaled in the program, are the batches made of
  them on the host.
  """
  rng = np.random.default_rng(0)
  images, targets = rng.integers(0, 256, (20, T, 2), np.uint8), rng.normal(size=20)
  rows = rng.permutation(20).reshape(5, 4)

  def read(source, chosen):
    images, targets = source
    return fptt_jax.Batch(images[chosen].swapaxes(0, 1) / 255.0, targets[chosen])

  trainer = make()
  first = read((images, targets), rows[0])
  state, metrics = fptt_jax.scan_train_steps(trainer, read)(
    trainer.init(jax.random.key(1), first), (images, targets), rows
  )
  expected, losses_seen = trainer.init(jax.random.key(1), first), []
  for chosen in rows:
    expected, seen = trainer.step(expected, read((images, targets), chosen))
    losses_seen.append(seen.loss)
  assert_same(state, expected)
  assert_same(metrics.loss, jnp.stack(losses_seen))


def test_one_trace_and_no_copy_of_the_source():
  """A second epoch compiles nothing; the data set is read where it lies, neither copied
  whole nor turned into floats.
  """
  traces = []

  def read(source, chosen):
    traces.append(None)
    return fptt_jax.Batch(
      source[chosen].swapaxes(0, 1).astype(jnp.float32) / 255.0, jnp.ones(B)
    )

  trainer = make(optimizer=fptt_jax.fptt(optax.sgd(0.1)), dtype=jnp.float32)
  source, rows = jnp.ones((100_000, T, 2), jnp.uint8), np.arange(8 * B).reshape(8, B)
  state = trainer.init(jax.random.key(1), jax.eval_shape(read, source, rows[0]))
  traces.clear()
  run = fptt_jax.scan_train_steps(trainer, read)
  memory = helpers.optimized(run.lower(state, source, rows)).memory_analysis()
  for _ in range(3):
    state, _ = run(state, source, rows)
  assert len(traces) <= 2  # Once for each of lower and call.
  assert memory.temp_size_in_bytes < source.nbytes / 4


def test_scan_on_a_mesh():
  """The program of many steps takes a trainer that splits the batch over devices."""
  batches, stacked = data(np.float32)
  optimizer = fptt_jax.fptt(optax.sgd(0.1))
  results = []
  for mesh in (None, mesh_of(2)):
    trainer = make(optimizer=optimizer, dtype=jnp.float32, mesh=mesh)
    state, metrics = fptt_jax.scan_train_steps(trainer)(
      trainer.init(jax.random.key(1), batches[0]), (), stacked
    )
    results.append((state, metrics))
  assert_same(results[1], results[0], 1e-5)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  ('method', 'own_batches', 'devices'),
  [(method, bool(number % 2), None) for number, method in enumerate(fptt_jax.METHODS)]
  + [('fptt', True, None), ('fptt', True, 2), ('bptt', False, 2)],
)
def test_population_equal_trainers(method, own_batches, devices):
  """Seeds side by side are the seeds one by one: state, metrics, evaluation, end of an
  epoch.
  """
  options = {'truncation_steps': 4} if method == 'tbptt_final' else {}
  one = make(method, carry_hidden=True, **options)
  many = helpers.quickened(
    fptt_jax.vmap_trainer(
      one, own_batches=own_batches, mesh=devices and mesh_of(devices)
    )
  )
  one = helpers.quickened(one)
  batches, stacked = data()
  given = lambda first: (
    jax.tree.map(lambda x: x[first : first + 4], stacked)
    if own_batches
    else batches[first]
  )
  states = many.init(KEYS, given(0))
  for first in (0, 1):
    states, metrics = many.step(states, given(first))
  ended = many.end_epoch(states)
  evaluation = many.evaluate(states.params, batches[5])
  again = many.evaluate(states.params, batches[5], evaluation[1])
  for r, key in enumerate(KEYS):
    state = one.init(key, batches[0])
    for first in (0, 1):
      state, expected = one.step(state, batches[first + r if own_batches else first])
    member = lambda tree, r=r: jax.tree.map(lambda x: x[r], tree)
    assert_same(
      member((states, metrics, ended)), (state, expected, one.end_epoch(state))
    )
    totals, hidden = one.evaluate(state.params, batches[5])
    assert_same(
      member((evaluation, again)),
      ((totals, hidden), one.evaluate(state.params, batches[5], hidden)),
      1e-6,
    )


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  'varied',
  [{name: value * np.array([1.0, 0.5, 0.25, 0.1])} for name, value in PLAIN.items()]
  + [
    dict(
      learning_rate=np.array([0.1, 0.1, 0.2, 0.2]), alpha=np.array([0.5, 0.1, 0.5, 0.1])
    )
  ],
  ids=lambda varied: '-'.join(varied),
)
def test_hyperparameters_of_members(varied):
  """A hyper-parameter set in the state does what one built into the optimizer does."""
  batches, _ = data()
  many = helpers.quickened(fptt_jax.vmap_trainer(make()))
  states = many.init(jnp.stack([KEYS[0]] * 4), batches[0])
  states = states._replace(
    opt_state=optax.tree.set(
      states.opt_state, **{k: jnp.asarray(v) for k, v in varied.items()}
    )
  )
  for batch in batches[:3]:
    states, metrics = many.step(states, batch)
  assert np.ptp(np.asarray(metrics.loss)[:, -1]) > 0
  for r in range(4):
    settings = PLAIN | {name: values[r] for name, values in varied.items()}
    base = optax.chain(
      optax.clip_by_global_norm(settings['clip']),
      optax.sgd(settings['learning_rate'], momentum=0.9),
    )
    alone = helpers.quickened(
      make(
        optimizer=fptt_jax.fptt(
          base, **{name: settings[name] for name in ('alpha', 'beta', 'kappa')}
        )
      )
    )
    state = alone.init(KEYS[0], batches[0])
    for batch in batches[:3]:
      state, _ = alone.step(state, batch)
    assert_same(jax.tree.map(lambda x, r=r: x[r], states.params), state.params)


def test_one_member_diverges():
  """Its numbers are not finite; those of the others are what they are without it, bit
  for bit.
  """
  batches, _ = data(np.float32)
  many = fptt_jax.vmap_trainer(
    make(
      optimizer=optax.inject_hyperparams(optax.sgd)(0.1),
      method='tbptt',
      dtype=jnp.float32,
    )
  )

  def train(rates):
    states = many.init(KEYS, batches[0])
    states = states._replace(
      opt_state=optax.tree.set(
        states.opt_state, learning_rate=jnp.asarray(rates, jnp.float32)
      )
    )
    for _ in range(12):
      states, metrics = many.step(states, batches[0])
    return jax.tree.leaves((states.params, metrics.loss))

  for good, bad in zip(
    train([0.1, 0.1, 0.1, 0.1]), train([0.1, 1e18, 0.1, 0.1]), strict=True
  ):
    good, bad = np.asarray(good), np.asarray(bad)
    assert not np.isfinite(bad[1]).all()
    np.testing.assert_array_equal(good[[0, 2, 3]], bad[[0, 2, 3]])


@pytest.mark.parametrize('devices', [None, 2])
def test_one_members_batch_is_bad(devices):
  """It skips its updates and is what it was, the others are what they are without that,
  bit for bit.
  """
  optimizer = fptt_jax.fptt(optax.adam(0.01))
  one = make(
    optimizer=optimizer, dtype=jnp.float32, carry_hidden=True, skip_nonfinite=True
  )
  many = fptt_jax.vmap_trainer(one, own_batches=True, mesh=devices and mesh_of(devices))
  _, stacked = data(np.float32)
  good = jax.tree.map(lambda x: x[:4], stacked)
  bad = good._replace(inputs=good.inputs.copy())
  bad.inputs[1, :, 0] = np.nan
  start = many.init(KEYS, good)
  before = jax.tree.map(np.asarray, start[:4])
  (state, metrics), (expected, expected_metrics) = (
    helpers.quick(many.step)(start, batch) for batch in (bad, good)
  )
  assert metrics.skipped.tolist() == [[False] * 3, [True] * 3, [False] * 3, [False] * 3]
  assert metrics.lambda_norm.shape == (4,)
  assert metrics.lambda_norm[1] == 0
  pick = lambda tree, members: jax.tree.map(lambda x: np.asarray(x)[members], tree)
  jax.tree.map(np.testing.assert_array_equal, pick(state[:4], 1), pick(before, 1))
  others = [0, 2, 3]
  jax.tree.map(
    np.testing.assert_array_equal,
    pick((state[:4], metrics), others),
    pick((expected[:4], expected_metrics), others),
  )


@pytest.mark.usefixtures('x64')
def test_scan_of_a_population():
  """The two together: an epoch of many members in one program, each with its own order
  of the data.
  """
  one = helpers.quickened(make())
  batches, stacked = data()
  orders = np.stack(
    [np.random.default_rng(r).permutation(N) for r in range(4)], axis=1
  )  # [N, R]
  read = lambda source, chosen: jax.tree.map(lambda x: jnp.asarray(x)[chosen], source)
  many = fptt_jax.vmap_trainer(make(), own_batches=True)
  run = fptt_jax.scan_train_steps(many, jax.vmap(read, in_axes=(None, 0)))
  states, metrics = run(
    many.init(KEYS, jax.vmap(read, in_axes=(None, 0))(stacked, orders[0])),
    stacked,
    orders,
  )
  assert metrics.loss.shape == metrics.skipped.shape == (N, 4, 3)
  assert metrics.lambda_norm.shape == (N, 4)
  for r, key in enumerate(KEYS):
    state = one.init(key, batches[0])
    for n in orders[:, r]:
      state, _ = one.step(state, batches[n])
    assert_same(jax.tree.map(lambda x, r=r: x[r], states.params), state.params)


def test_bad_calls():
  """What was got and what was expected."""
  batches, _ = data(np.float32)
  many = fptt_jax.vmap_trainer(make(dtype=jnp.float32), mesh=mesh_of(3))
  with pytest.raises(
    ValueError,
    match=(
      r'number of members R must be a multiple of the 3 devices it is split over, '
      r'got 4\.'
    ),
  ):
    many.init(KEYS, batches[0])
  with pytest.raises(ValueError, match=r'keys must be \[R\]'):
    many.init(KEYS[0], batches[0])
  with pytest.raises(TypeError, match=r'mesh must be of type jax\.Mesh, got 2'):
    fptt_jax.vmap_trainer(make(dtype=jnp.float32), mesh=2)
