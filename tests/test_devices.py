"""A batch split over devices against the same batch on one."""

import math
import os
import re
import subprocess
import sys

from flax import nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.core import devices, recipe
from experiments.core.flags import UserError
import fptt_jax
from fptt_jax import losses, nn
from fptt_jax.parallel import _collectives

T, B, C, N = 10, 16, 3, 24
LENGTHS = np.array([10, 3, 7, 1, 2, 9, 4, 4, 1, 1, 1, 1, 2, 2, 2, 2], np.int32)
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(T, B, 2))
LABELS, IDS = (
  RNG.integers(0, C, B).astype(np.int32),
  RNG.permutation(N)[:B].astype(np.int32),
)
TASKS = {
  'class_ema': (losses.terminal_classification(C, ema_decay=0.5), LABELS, C),
  'last_epoch': (losses.terminal_classification(C, divergence='last_epoch'), LABELS, C),
  'example': (
    losses.terminal_classification(C, divergence='example', num_examples=N),
    (LABELS, IDS),
    C,
  ),
  'regression': (losses.terminal_regression(), RNG.normal(size=B), 1),
  'language': (
    losses.sequence_classification(C, accuracy=True),
    RNG.integers(0, C, (T, B)).astype(np.int32),
    C,
  ),
  'series': (losses.sequence_regression(), RNG.normal(size=(T, B, 1)), 1),
}


def mesh_of(number):
  return jax.sharding.Mesh(jax.devices('cpu')[:number], ('batch',))


def make(task, method, mesh, optimizer, dtype=jnp.float64, **options):
  loss, targets, out = TASKS[task]
  tx = optimizer()
  if fptt_jax.METHODS[method].regularized:
    tx = fptt_jax.fptt(tx, alpha=0.5)
  if fptt_jax.METHODS[method].num_windows is None:
    options = {'num_windows': 4} | options
  if method == 'tbptt_final':
    options = {'truncation_steps': 4} | options
  model = helpers.lstm(hidden=8, out=out, dtype=dtype)
  return helpers.quick_trainer(
    model, loss, tx, method=method, mesh=mesh, **options
  ), targets


def on_devices(number):
  """Options of a trainer: one device, several with all parameters on each, several with
  their shards.
  """
  return [
    {'mesh': None},
    {'mesh': mesh_of(number)},
    {'mesh': mesh_of(number), 'shard_params': True},
  ]


def train(
  task,
  method,
  mesh,
  lengths,
  steps,
  optimizer=lambda: optax.sgd(0.1, momentum=0.9),
  **options,
):
  """Everything that came of some steps, and of an evaluation."""
  trainer, targets = make(task, method, mesh, optimizer, **options)
  batch = fptt_jax.Batch(INPUTS, targets, lengths)
  state = trainer.init(jax.random.key(0), batch)
  metrics = []
  for _ in range(steps):
    state, seen = trainer.step(state, batch)
    metrics.append(seen)
  evaluations = [trainer.evaluate(state.params, batch)]
  if fptt_jax.METHODS[method].regularized:
    evaluations.append(
      trainer.evaluate(fptt_jax.fptt_eval_params(state.opt_state, state.params), batch)
    )
  return (
    state._replace(key=None),
    metrics,
    evaluations,
    trainer.end_epoch(state)._replace(key=None),
  )


def assert_same(got, expected, tolerance=1e-10):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    # Totals are sums in float32.
    np.testing.assert_allclose(
      a, b, rtol=1e-5 if a.dtype == np.float32 else tolerance, atol=tolerance
    )


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  'method', [method for method in fptt_jax.METHODS if method != 'fptt']
)
def test_methods_on_eight_devices(method):
  """20 updates at least, parameters on each device or split."""
  steps = 20 if not fptt_jax.METHODS[method].update_each_window else 5
  one, *several = (
    train('regression', method, lengths=None, steps=steps, **where)
    for where in on_devices(8)
  )
  for split in several:
    assert_same(split, one)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('lengths', [None, LENGTHS], ids=['full', 'ragged'])
@pytest.mark.parametrize('task', TASKS)
def test_losses_on_eight_devices(task, lengths):
  """FPTT, 20 updates, uneven windows; in the ragged batch some devices are left with no
  sequence long before others.
  """
  remembers = lengths is not None and bool(jax.tree.leaves(TASKS[task][0].init(1)))
  layouts = on_devices(8) if remembers or task == 'regression' else on_devices(8)[:2]
  one, *several = (
    train(task, 'fptt', lengths=lengths, steps=5, **where) for where in layouts
  )
  for split in several:
    assert_same(split, one)


def clipped_adam():
  """Looks at the whole gradient, and clips most of these."""
  return optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.01))


@pytest.mark.slow
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('method', fptt_jax.METHODS)
def test_adam_on_eight_devices(method):
  one, *several = (
    train('regression', method, lengths=None, steps=20, optimizer=clipped_adam, **where)
    for where in on_devices(8)
  )
  for split in several:
    assert_same(split, one)


@pytest.mark.usefixtures('x64')
def test_carried_hidden_state_on_two_devices():
  """It goes with its rows."""
  options = dict(lengths=LENGTHS, steps=3, optimizer=clipped_adam, carry_hidden=True)
  one, *several = (
    train('language', 'fptt', **options, **where) for where in on_devices(2)
  )
  for split in several:
    assert_same(split, one)


@pytest.mark.usefixtures('x64')
def test_explicit_gradients_on_two_devices():
  """What `grad_fn` gives is a mean over the devices too, as the gradient of each inner
  step is.
  """
  loss, targets, out = TASKS['series']

  def run(where):
    tx = fptt_jax.fptt(clipped_adam(), gradient_estimate='recomputed')
    model = helpers.elman(hidden=8, out=out, dtype=jnp.float64)
    trainer = helpers.quick_trainer(
      model, loss, tx, num_windows=4, inner_steps=2, **where
    )
    batch = fptt_jax.Batch(INPUTS, targets)
    state, _ = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    return state._replace(key=None)

  one, *several = map(run, on_devices(2))
  for split in several:
    assert_same(split, one)


@pytest.mark.parametrize('method', fptt_jax.METHODS)
def test_float32_on_eight_devices(method):
  """At least 20 updates of SGD agree to 1e-5."""
  setting = fptt_jax.METHODS[method]

  def run(where):
    trainer, targets = make(
      'regression',
      method,
      where.pop('mesh'),
      lambda: optax.sgd(0.1),
      dtype=jnp.float32,
      **where,
    )
    lengths = None if setting.truncated else LENGTHS
    batch = fptt_jax.Batch(
      INPUTS.astype(np.float32), targets.astype(np.float32), lengths
    )
    state = trainer.init(jax.random.key(0), batch)
    for _ in range(5 if setting.update_each_window else 20):
      state, _ = trainer.step(state, batch)
    return state._replace(key=None)

  one, *several = map(run, on_devices(8))
  for split in several:
    assert_same(split, one, 1e-5)


def collectives(text):
  """(name, numbers in its result) of a compiled module's collective operations: of each
  loop that has some, and of the rest.
  """
  bodies = {
    match.split(' ', 1)[0]: match
    for match in re.findall(r'^(?:ENTRY )?%?[\w.-]+ \(.*?^}', text, re.M | re.S)
  }
  loops = set(re.findall(r'body=(%?[\w.-]+)', text))
  found = {}
  for name, body in bodies.items():
    operations = re.findall(
      r' = (\([^)]*\)|\S+) (all-\w+|reduce-scatter|collective-\w+)\(', body
    )
    sizes = lambda shapes: sum(
      math.prod(map(int, filter(None, dims.split(','))))
      for dims in re.findall(r'\w\[([\d,]*)\]', shapes)
    )
    found.setdefault(name in loops, []).append(
      sorted((operation, sizes(shapes)) for shapes, operation in operations)
    )
  return sorted(filter(None, found[True])), [
    operation for body in found[False] for operation in body
  ]


def clipped_trainer(**where):
  """(trainer, its state, a batch): FPTT whose optimizer looks at the whole gradient."""
  loss, targets, out = TASKS['regression']
  tx = fptt_jax.fptt(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)))
  trainer = helpers.quick_trainer(
    helpers.lstm(hidden=32, out=out), loss, tx, num_windows=4, **where
  )
  batch = fptt_jax.Batch(INPUTS.astype(np.float32), targets.astype(np.float32))
  return trainer, trainer.init(jax.random.key(0), batch), batch


@pytest.mark.parametrize('skip_nonfinite', [False, True])
def test_one_mean_a_window(skip_nonfinite):
  """The compiled loop over windows has one collective operation, over gradient and
  objective together; the loop inside it none.
  """
  trainer, state, batch = clipped_trainer(
    mesh=mesh_of(2), skip_nonfinite=skip_nonfinite
  )
  loops, _ = collectives(trainer.step.lower(state, batch).compile().as_text())
  assert loops == [
    [('all-reduce', sum(leaf.size for leaf in jax.tree.leaves(state.params)) + 1)]
  ]


def test_shards(monkeypatch):
  """Each device keeps an eighth of parameters and optimizer state. A window gathers the
  parameters once and scatters the gradient once; what else is summed are a few numbers,
  and nothing is in the loop over steps. Evaluation gathers before its loop. The large
  array, of 32 x 128 numbers, goes by itself.
  """
  monkeypatch.setattr(_collectives, 'MAX_JOINED', 256)
  trainer, state, batch = clipped_trainer(mesh=mesh_of(8), shard_params=True)
  [window], _ = collectives(trainer.step.lower(state, batch).compile().as_text())
  sizes = {
    name: [size for operation, size in window if operation == name]
    for name, _ in window
  }
  rest = (
    sum(leaf.size for leaf in jax.tree.leaves(state.params)) - 32 * 128 - 1
  )  # The bias of the readout is whole.
  assert sizes['all-gather'] == [rest, 32 * 128]
  assert sizes['reduce-scatter'] == [rest / 8, 32 * 128 / 8]
  assert sizes.keys() == {'all-gather', 'reduce-scatter', 'all-reduce'}
  assert sum(sizes['all-reduce']) < 20
  loops, before = collectives(
    trainer.evaluate.lower(state.params, batch).compile().as_text()
  )
  assert not loops
  assert 'all-gather' in dict(before)
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  state, metrics = trainer.step(state, batch)
  assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
  assert jax.tree.map(lambda leaf: leaf.sharding, trainer.end_epoch(state)) == places
  leaves = jax.tree.leaves((state.params, state.opt_state))
  whole, mine = (
    sum(leaf.nbytes for leaf in leaves),
    sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
  )
  assert mine < 1.01 * whole / 8
  assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(metrics))


@pytest.mark.parametrize('task', ['class_ema', 'series'])
def test_one_devices_nan_skips_the_update_on_all(task):
  """NaN in one of 16 rows split over 8 devices: parameters, FPTT state, each device's
  rows of the hidden state, loss state are, bit for bit, what they are without those
  windows, and parameters the same on all devices; totals are summed in another
  order.
  """
  loss, targets, out = TASKS[task]
  inputs, targets = (
    INPUTS.astype(np.float32),
    targets if task == 'class_ema' else targets.astype(np.float32),
  )
  start, end = inputs.copy(), inputs.copy()
  start[5:, 3] = end[:5, 3] = np.nan  # Windows start at 0, 2, 5 and 7.
  options = dict(num_windows=4, carry_hidden=True, mesh=mesh_of(8), skip_nonfinite=True)
  trainer = helpers.quick_trainer(
    helpers.lstm(out=out), loss, fptt_jax.fptt(optax.adam(0.01)), **options
  )

  def train(sequences):
    state, seen = trainer.init(jax.random.key(0), fptt_jax.Batch(inputs, targets)), []
    for sequence in sequences:
      state, metrics = trainer.step(state, fptt_jax.Batch(sequence, targets))
      seen.append(metrics)
    return (
      state,
      [metrics.skipped.tolist() for metrics in seen],
      jax.tree.map(lambda *t: sum(t), *[m.totals for m in seen]),
    )

  state, skipped, totals = train([start, end])
  expected, _, expected_totals = train([inputs])
  assert skipped == [[False, False, True, True], [True, True, False, False]]
  jax.tree.map(np.testing.assert_array_equal, state[:4], expected[:4])
  assert_same(totals, expected_totals)
  for leaf in jax.tree.leaves(state.params):
    assert all(np.array_equal(shard.data, leaf) for shard in leaf.addressable_shards)


@pytest.mark.parametrize('shard_params', [False, True])
def test_noise_differs_between_devices(shard_params):
  """A model whose hidden state is what its key draws: each device's share of the rows
  is another draw.
  """
  draw = lambda params, state, x, mask, key: (
    jax.random.normal(key, state.shape),
    x[..., :1] * params[None, None],
  )
  model = fptt_jax.Model(
    lambda key: jnp.ones(1), lambda batch_size: jnp.zeros((batch_size, 3)), draw
  )
  options = dict(
    method='tbptt',
    num_windows=1,
    carry_hidden=True,
    mesh=mesh_of(2),
    shard_params=shard_params,
  )
  trainer = fptt_jax.make_trainer(
    model, losses.sequence_regression(), optax.sgd(0.1), **options
  )
  batch = fptt_jax.Batch(INPUTS.astype(np.float32), np.zeros((T, B, 1), np.float32))
  state, _ = trainer.step(trainer.init(jax.random.key(0), batch), batch)
  first, second = np.split(np.asarray(state.hidden), 2)
  assert not np.any(first == second)


def test_what_does_not_fit_is_refused():
  loss, targets, _ = TASKS['regression']
  build = lambda mesh: fptt_jax.make_trainer(
    helpers.lstm(), loss, optax.sgd(0.1), method='tbptt', num_windows=2, mesh=mesh
  )
  batch = fptt_jax.Batch(INPUTS.astype(np.float32), targets.astype(np.float32))
  with pytest.raises(
    ValueError,
    match=(
      r'batch size B must be a multiple of the 3 devices it is split over, got '
      r'16\.'
    ),
  ):
    build(mesh_of(3)).init(jax.random.key(0), batch)
  with pytest.raises(ValueError, match=r'shard_params .*mesh=None, got True'):
    fptt_jax.make_trainer(
      helpers.lstm(), loss, optax.sgd(0.1), method='tbptt', shard_params=True
    )
  square = jax.sharding.Mesh(np.array(jax.devices('cpu')[:4]).reshape(2, 2), ('a', 'b'))
  with pytest.raises(
    ValueError,
    match=r"mesh must be of one axis, got \('a', 'b'\)\.",
  ):
    build(square)
  with pytest.raises(TypeError, match=r"mesh must be of type jax\.Mesh, got 'cpu'\."):
    build('cpu')


def test_evaluation_of_any_batch_size():
  """What cannot be split is evaluated whole."""
  loss, targets, _ = TASKS['regression']
  trainer = fptt_jax.make_trainer(
    helpers.lstm(),
    loss,
    optax.sgd(0.1),
    method='tbptt',
    num_windows=2,
    mesh=mesh_of(2),
  )
  params = helpers.lstm().init(jax.random.key(0))
  inputs, targets = INPUTS.astype(np.float32), targets.astype(np.float32)
  whole, _ = trainer.evaluate(params, fptt_jax.Batch(inputs, targets))
  parts = [
    trainer.evaluate(params, fptt_jax.Batch(inputs[:, rows], targets[rows]))[0]
    for rows in (slice(5), slice(5, None))
  ]
  assert fptt_jax.compute_metrics(whole)['loss'] == pytest.approx(
    float(parts[0]['loss'] + parts[1]['loss']) / B, rel=1e-5
  )


@pytest.mark.parametrize(
  ('options', 'batch_size', 'hidden', 'steps', 'members', 'expected'),
  [
    ({}, 128, 128, 7, 1, 8),  # Of 8 simulated cores.
    ({}, 8, 16, 99, 1, 1),
    ({}, 64, 1024, 9, 1, 1),
    ({}, 100, 128, 7, 1, 1),
    ({'devices': 1}, 128, 128, 7, 1, 1),
    ({}, 128, 128, 1, 1, 1),
    ({'devices': 2}, 8, 16, 1, 1, 2),
    ({}, 8, 16, 1, 16, 8),
    ({}, 128, 128, 7, 3, 1),
    ({'devices': 3}, 128, 128, 7, 3, 3),
  ],
)
def test_scripts_choose_devices(options, batch_size, hidden, steps, members, expected):
  """A batch is split where there is one run, else the runs are shared out."""
  meshes = devices.choose_meshes(
    recipe.Recipe(**options), batch_size, hidden, steps, members
  )
  mesh, other = meshes if members == 1 else meshes[::-1]
  assert (1 if mesh is None else mesh.size) == expected
  assert other is None


@pytest.mark.parametrize(
  ('count', 'members', 'message'),
  [
    (9, 1, r'--devices must be .*, got 9\.'),
    (3, 1, r'--devices must be .*, got 3\.'),
    (2, 3, r'--devices must be .*, got 2\.'),
  ],
)
def test_devices_that_do_not_fit_are_refused(count, members, message):
  with pytest.raises(UserError, match=message):
    devices.choose_meshes(recipe.Recipe(devices=count), 16, 128, 7, members)


def test_cpu_setup(monkeypatch):
  """In a new process it gives the devices asked for, by default the cores the process
  may use; here, too late, it is silent.
  """
  fptt_jax.use_cpu_devices(3)
  assert len(jax.devices('cpu')) == 8
  code = 'import fptt_jax, jax; fptt_jax.use_cpu_devices({}); print(jax.device_count())'
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  counts = [
    subprocess.check_output(
      [sys.executable, '-c', code.format(number)], text=True
    ).strip()
    for number in (3, '')
  ]
  cores = (
    len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  )
  assert counts == ['3', str(cores)]
  with pytest.raises(
    ValueError, match=r'num_devices must be an integer from 1 to 1024, got 0\.'
  ):
    fptt_jax.use_cpu_devices(0)


def rows_differ():
  """A model whose rows start from 0, 1, 2, ...: outputs x + w h."""
  return fptt_jax.Model(
    init=lambda key: {'w': jnp.ones(1)},
    initial_state=lambda batch_size: jnp.arange(float(batch_size))[:, None],
    apply=lambda params, state, x, mask, key: (
      state,
      x + params['w'][None, None] * state[None],
    ),
  )


def run_rows_that_differ(method='tbptt', scanned=False, **options):
  """Everything that comes of three steps, an evaluation, and an epoch's end."""
  if fptt_jax.METHODS[method].num_windows is None:
    options = {'num_windows': 2} | options
  trainer = fptt_jax.make_trainer(
    rows_differ(),
    losses.sequence_regression(),
    optax.sgd(0.01),
    method=method,
    **options,
  )
  batch = fptt_jax.Batch(INPUTS[..., :1], INPUTS[..., 1:])
  state = trainer.init(jax.random.key(0), batch)
  if scanned:
    items = jax.tree.map(lambda leaf: np.stack([leaf] * 3), batch)
    state, seen = fptt_jax.scan_train_steps(trainer)(state, (), items)
  else:
    seen = []
    for _ in range(3):
      state, metrics = trainer.step(state, batch)
      seen.append(metrics)
  evaluated = trainer.evaluate(state.params, batch)
  return state._replace(key=None), seen, evaluated, trainer.end_epoch(state).hidden


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  'options',
  [
    {},
    {'carry_hidden': True},
    {'method': 'ftrl'},
    {'method': 'tbptt_final', 'truncation_steps': 4},
    {'inner_steps': 2, 'scanned': True},
  ],
  ids=str,
)
def test_initial_states_that_differ_by_row(options):
  """Each device starts from its own rows of the whole batch's initial state."""
  one, *several = (run_rows_that_differ(**options, **where) for where in on_devices(4))
  for split in several:
    assert_same(split, one)
  np.testing.assert_array_equal(one[3][:, 0], np.arange(B))


@pytest.mark.usefixtures('x64')
def test_population_start_from_the_same_rows():
  """Members are shared out to devices whole, so each of them sees all rows of the
  batch.
  """
  batch = fptt_jax.Batch(INPUTS[..., :1], INPUTS[..., 1:])
  trainer = fptt_jax.make_trainer(
    rows_differ(),
    losses.sequence_regression(),
    optax.sgd(0.01),
    method='tbptt',
    num_windows=2,
  )
  expected = run_rows_that_differ()
  members = fptt_jax.vmap_trainer(trainer, mesh=mesh_of(2))
  state = members.init(jax.random.split(jax.random.key(0), 4), batch)
  for _ in range(3):
    state, _ = members.step(state, batch)
  totals, hidden = members.evaluate(state.params, batch)
  for member in range(4):
    got = jax.tree.map(
      lambda leaf, r=member: leaf[r], (state.params, state.hidden, (totals, hidden))
    )
    assert_same(got, (expected[0].params, expected[0].hidden, expected[2]))


@pytest.mark.usefixtures('x64')
def test_gradient_of_evaluation_on_devices():
  """It is that of one device, with respect to parameters and to the initial state."""
  loss, targets, out = TASKS['series']
  model = helpers.elman(out=out, dtype=jnp.float64)
  batch = fptt_jax.Batch(INPUTS, targets, LENGTHS)

  def gradient(where):
    trainer = fptt_jax.make_trainer(
      model, loss, optax.sgd(0.1), method='tbptt', **where
    )
    state = trainer.init(jax.random.key(0), batch)
    evaluated = lambda params, hidden: trainer.evaluate(params, batch, hidden)[0][
      'loss'
    ]
    return jax.grad(evaluated, argnums=(0, 1))(state.params, state.hidden)

  one, *several = map(gradient, on_devices(2))
  for split in several:
    assert_same(split, one, 1e-6)


@pytest.mark.parametrize('per_step', [False, True])
def test_a_part_of_the_rows_may_be_as_many_as_the_steps(per_step):
  """T = 4 steps, and four of B = 8 rows on each of two devices: targets [T, B] of a
  loss at the end are still those of the steps, and targets [B, 4] those of the rows.
  """

  def error(outputs, targets, window):
    rows = jnp.arange(outputs.shape[1])
    last = window.slice(targets)[window.last, rows]
    return window.mean((outputs[window.last, rows, 0] - last) ** 2, window.active)

  def measure(outputs, targets, window):
    return {'loss': jnp.float32(0), 'count': window.mask.sum()}

  rng = np.random.default_rng(0)
  mask = np.ones((4, 8), bool)
  mask[:, [3, 7]] = False
  batch = fptt_jax.Batch(
    rng.normal(size=(4, 8, 2)).astype(np.float32),
    rng.normal(size=(4, 8) if per_step else (8, 4)).astype(np.float32),
    mask=mask,
  )
  loss = losses.terminal_regression()
  if per_step:
    loss = losses.from_function(error, measure, terminal=True)
  found = []
  for mesh in (None, jax.sharding.Mesh(jax.devices()[:2], ('batch',))):
    trainer = helpers.quick_trainer(
      helpers.elman(out=1 if per_step else 4),
      loss,
      optax.sgd(0.1),
      method='tbptt',
      num_windows=2,
      mesh=mesh,
    )
    state = trainer.init(jax.random.key(0), batch)
    after, metrics = trainer.step(state, batch)
    totals, _ = trainer.evaluate(state.params, batch)
    found.append((metrics.loss, metrics.grad_norm, totals['loss'], after.params))
  assert_same(found[1], found[0], 1e-5)


def explicit_mesh(number, axis='batch'):
  """A mesh with an explicit axis, the default of `jax.make_mesh` in newer releases."""
  devices = jax.devices('cpu')[:number]
  types = (jax.sharding.AxisType.Explicit,)
  return jax.make_mesh((number,), (axis,), types, devices=devices)


def train_placed(mesh, spec=None, over=None):
  """The losses of two steps and the evaluated one, the inputs sharded as `spec` over
  the mesh `over`.
  """
  trainer = helpers.quick_trainer(
    helpers.lstm(),
    losses.terminal_regression(),
    optax.sgd(0.1),
    method='tbptt',
    num_windows=2,
    mesh=mesh,
  )
  batch = fptt_jax.Batch(
    INPUTS.astype(np.float32), TASKS['regression'][1].astype(np.float32)
  )
  if over is not None:
    batch = batch._replace(
      inputs=jax.device_put(batch.inputs, jax.sharding.NamedSharding(over, spec))
    )
  state = trainer.init(jax.random.key(0), batch)
  seen = []
  for _ in range(2):
    state, metrics = trainer.step(state, batch)
    seen.append(np.asarray(metrics.loss))
  totals, _ = trainer.evaluate(state.params, batch)
  trainer.end_epoch(state)
  return np.stack(seen), np.asarray(totals['loss'])


Spec = jax.sharding.PartitionSpec


@pytest.mark.parametrize(
  'spec', [None, Spec(None, 'batch'), Spec('batch'), Spec()], ids=str
)
def test_explicit_meshes_and_inputs_sharded_over_them(spec):
  """A trainer's mesh may be explicit, and a batch lie on it in any way."""
  mesh = explicit_mesh(2)
  got = train_placed(mesh, spec, None if spec is None else mesh)
  assert_same(got, train_placed(None), 1e-5)


def test_the_trainers_mesh_may_be_set():
  """With an automatic axis; without a mesh of its own a trainer does not mind which one
  is set.
  """
  expected = train_placed(None)
  with jax.set_mesh(mesh_of(2)):
    assert_same(train_placed(mesh_of(2)), expected, 1e-5)
  with jax.set_mesh(explicit_mesh(2)):
    assert_same(train_placed(None), expected, 1e-5)


@pytest.mark.parametrize(
  'other', [explicit_mesh(2), explicit_mesh(4, 'rows'), mesh_of(4)], ids=str
)
def test_another_mesh_that_is_set_is_refused(other):
  with (
    jax.set_mesh(other),
    pytest.raises(ValueError, match=r"set_mesh .*'batch': 2"),
  ):
    train_placed(mesh_of(2))


@pytest.mark.parametrize('mesh', [None, mesh_of(2)], ids=str)
def test_inputs_sharded_explicitly_over_another_mesh_are_refused(mesh):
  with pytest.raises(ValueError, match=r"batch.inputs .*shard.*, got .*'rows'"):
    train_placed(mesh, Spec(None, 'rows'), explicit_mesh(4, 'rows'))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('lengths', [[6, 6, 2, 1], None])
def test_an_own_loss_is_measured_as_on_one_device(lengths):
  """The mean over each device's rows is weighted by their steps, once. A batch of equal
  lengths may have a loss of the whole batch.
  """

  def squared_error(outputs, targets, window):
    error = jnp.square(outputs - window.slice(targets)).mean(-1)
    if lengths is None:
      return jnp.sqrt(window.total(jnp.sum(error)))
    return window.mean(error, window.mask)

  batch = helpers.series_batch(6, 4, dtype=np.float64)
  if lengths is not None:
    batch = batch._replace(lengths=np.array(lengths, np.int32))
  found = []
  for mesh in (None, mesh_of(2)):
    trainer = helpers.quick_trainer(
      helpers.elman(dtype=jnp.float64),
      losses.from_function(squared_error, terminal=False),
      optax.sgd(0.1),
      method='tbptt',
      num_windows=2,
      mesh=mesh,
    )
    state = trainer.init(jax.random.key(0), batch)
    totals, _ = trainer.evaluate(state.params, batch)
    _, metrics = trainer.step(state, batch)
    found.append((totals, metrics.totals, metrics.loss))
  assert_same(found[1], found[0])


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('layer', ['activation', 'temporal', 'reconstruction'])
def test_penalties_on_ragged_batches(layer, monkeypatch):
  """They are means over the whole batch, as on one device."""
  # Anchors would be drawn for each device apart; here they are the last ones.
  monkeypatch.setattr(
    jax.random,
    'randint',
    lambda key, shape, low, high, *rest: jnp.broadcast_to(jnp.asarray(high) - 1, shape),
  )

  def build(rngs):
    wide = dict(param_dtype=jnp.float64, rngs=rngs)
    recurrent = nn.GRU(1, 3, **wide)
    layers = {
      'activation': [recurrent, nn.ActivationPenalty(2.0)],
      'temporal': [recurrent, nn.TemporalActivationPenalty(2.0)],
      'reconstruction': [nn.Reconstruction(recurrent, 1, segment=2, rngs=rngs)],
    }
    return nn.Sequential(*layers[layer], nnx.Linear(3, 1, **wide))

  batch = helpers.series_batch(7, 4, 1, dtype=np.float64)
  batch = batch._replace(lengths=np.array([7, 6, 3, 2], np.int32))
  found = []
  for where in on_devices(2):
    trainer = helpers.quick_trainer(
      nn.from_nnx(build),
      losses.sequence_regression(),
      optax.sgd(0.1),
      method='tbptt',
      num_windows=2,
      **where,
    )
    state, metrics = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    found.append((metrics.loss, metrics.grad_norm, state.params))
  one, *several = found
  for split in several:
    assert_same(split, one)
