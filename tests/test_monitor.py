"""What is said of numbers that are not finite, and when λ counts as having run away."""

import helpers
import jax
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import losses

NAN, INF = np.nan, np.inf


def metrics(loss, grad_norm, lambda_norm, skipped=False):
  """StepMetrics of the given numbers, float32 as a step's."""
  loss, grad_norm, lambda_norm = (
    np.asarray(x, np.float32) for x in (loss, grad_norm, lambda_norm)
  )
  return fptt_jax.StepMetrics(
    loss, grad_norm, {}, np.broadcast_to(skipped, loss.shape), lambda_norm
  )


ONE = metrics([1.2, 2.31, NAN, NAN], [13.7, 14.21, INF, NAN], NAN)
MANY = metrics([[1.5, 1.25], [INF, NAN]], [[3.0, 14.2], [NAN, NAN]], [8.1e6, NAN])


@pytest.mark.parametrize(
  ('seen', 'options', 'message'),
  [
    (
      ONE,
      {},
      'loss is nan in window 2 of 4 (update 2): gradient norm inf; the last finite '
      'update, 1, had loss 2.31 and gradient norm '
      '14.2; norm of lambda nan after the batch.',
    ),
    (
      MANY,
      dict(first_update=120, radius=fptt_jax.spectral_radius(2.0, 1.0, kappa=2.0)),
      'loss is inf in batch 1 of 2, window 0 of 2 (update 122): gradient norm nan; the '
      'last finite update, 121, had loss 1.25 and '
      'gradient norm 14.2; norm of lambda 8.1e+06 before and nan after the batch; the '
      "recursion's spectral radius is 1.82 "
      '(unstable above 1).',
    ),
    (
      metrics([[0.5]], [[INF]], [0]),
      {},
      'gradient norm is inf in batch 0 of 1, window 0 of 1 (update 0): loss 0.5.',
    ),
    (
      metrics(
        [[0.5, NAN], [0.25, NAN]],
        [[1, NAN], [INF, NAN]],
        [0, 0],
        [[False, True], [False, False]],
      ),
      dict(first_update=7),
      'gradient norm is inf in batch 1 of 2, window 0 of 2 (update 9): loss 0.25; the '
      'last finite update, 7, had loss 0.5 and '
      'gradient norm 1.',
    ),
  ],
  ids=['a step', 'steps', 'the first', 'after a skipped one'],
)
def test_messages(seen, options, message):
  """Word for word; the error says the same."""
  assert fptt_jax.find_nonfinite(seen, **options) == message
  with pytest.raises(FloatingPointError) as error:
    fptt_jax.raise_if_nonfinite(seen, **options)
  assert str(error.value) == message


@pytest.mark.parametrize(
  'seen',
  [
    metrics([1, 2], [3, 4], 0),
    metrics(
      [[1, NAN], [INF, 2]], [[3, NAN], [1, INF]], [1, 2], [[False, True], [True, True]]
    ),
  ],
)
def test_nothing_is_said_of_finite_or_skipped_updates(seen):
  assert fptt_jax.find_nonfinite(seen) is None
  fptt_jax.raise_if_nonfinite(seen)


@pytest.mark.parametrize(
  ('seen', 'options', 'message'),
  [
    (
      jax.tree.map(lambda leaf: leaf[None], MANY),
      {},
      r'metrics must .* \[U\] or \[N, U\], got .*loss=float..\[1, 2, 2\], ',
    ),
    (
      MANY._replace(lambda_norm=np.zeros([])),
      {},
      r'metrics .*loss=float..\[2, 2\], .*lambda_norm=float64\[\], ',
    ),
    (MANY._replace(skipped=np.zeros((2, 2))), {}, r'metrics .*skipped=float64\[2, 2\]'),
    (ONE, dict(first_update=-1), r'first_update must be an integer >= 0, got -1\.'),
    (ONE, dict(radius=NAN), r'radius must be a finite number >= 0, got nan\.'),
  ],
)
def test_what_does_not_fit_is_refused(seen, options, message):
  """A population's metrics with all its members, among others."""
  with pytest.raises(ValueError, match=message):
    fptt_jax.find_nonfinite(seen, **options)


def test_a_run_that_is_shown_nan():
  """The second half of the second batch; λ is NaN after it, and was not before."""
  batches = jax.tree.map(
    lambda leaf: np.stack([leaf, leaf]), helpers.regression_batch(4, 2)
  )
  batches.inputs[1, 2:] = NAN
  optimizer = fptt_jax.fptt(optax.sgd(0.1))
  trainer = fptt_jax.make_trainer(
    helpers.elman(), losses.terminal_regression(), optimizer, num_windows=2
  )
  state = trainer.init(jax.random.key(0), helpers.regression_batch(4, 2))
  _, seen = helpers.quick(fptt_jax.scan_train_steps(trainer))(state, (), batches)
  message = (
    'loss is nan in batch 1 of 2, window 1 of 2 (update 3): gradient norm nan; the '
    'last finite update, 2, had loss '
    f'{seen.loss[1, 0]:.3g} and gradient norm {seen.grad_norm[1, 0]:.3g}; norm of '
    f'lambda {seen.lambda_norm[0]:.3g} before and nan '
    'after the batch.'
  )
  assert fptt_jax.find_nonfinite(seen) == message


# λ running away.


def norms_of_a_run(loss, make_batch, optimizer, num_batches, out=1, weight=1.0):
  """Losses [N, U], norms of λ [N] and of the gradient [N, U] of a small network on
  fresh batches.
  """
  batches = [make_batch(12, 8, seed=seed) for seed in range(num_batches)]
  trainer = fptt_jax.make_trainer(
    helpers.elman(hidden=8, out=out),
    loss,
    optimizer,
    num_windows=4,
    loss_weights=[weight] * 4,
  )
  state = trainer.init(jax.random.key(0), batches[0])
  run = helpers.quick(fptt_jax.scan_train_steps(trainer))
  _, seen = run(state, (), jax.tree.map(lambda *leaves: np.stack(leaves), *batches))
  return np.asarray(seen.loss), np.asarray(seen.lambda_norm), np.asarray(seen.grad_norm)


REGRESSION = (losses.sequence_regression(), helpers.series_batch)
TAGGING = (losses.sequence_classification(3), helpers.tagging_batch)
UNSTABLE = dict(alpha=1.0, kappa=2.0)


@pytest.mark.parametrize(
  ('task', 'out', 'clip', 'latest'),
  [(REGRESSION, 1, 1.0, 0.5), (TAGGING, 3, np.inf, 0.25)],
  ids=['squared error', 'cross-entropy'],
)
def test_a_diverging_run_is_found_out(task, out, clip, latest):
  """SGD of 2, α = 1, κ = 2: radius 1.82. Seen in the first half, or quarter, of the
  batches with finite losses, and from then on, whether the gradient grows along with λ
  (squared error, clipped) or falls behind.
  """
  assert fptt_jax.spectral_radius(2.0, **UNSTABLE) == pytest.approx(1.82, abs=0.005)
  optimizer = optax.chain(
    optax.clip_by_global_norm(clip), fptt_jax.fptt(optax.sgd(2.0), **UNSTABLE)
  )
  loss, lambdas, grads = norms_of_a_run(*task, optimizer, 40, out)
  finite = np.isfinite(loss).all(1)
  assert not finite.all()
  found = [
    fptt_jax.lambda_diverges(lambdas[:n], grads[:n]) for n in range(1, len(lambdas) + 1)
  ]
  first = found.index(True)
  assert 1 <= first <= latest * finite.argmin()
  assert all(found[first:])


@pytest.mark.parametrize(
  ('task', 'out', 'optimizer', 'weight'),
  [
    (REGRESSION, 1, fptt_jax.fptt(optax.adam(1e-2), alpha=0.1), 1.0),
    (REGRESSION, 1, fptt_jax.fptt(optax.adam(1e-2), alpha=0.5), 1.0),
    (
      TAGGING,
      3,
      fptt_jax.fptt(optax.sgd(2.0, momentum=0.9), alpha=0.5, kappa=2.0),
      1.0,
    ),
    (TAGGING, 3, fptt_jax.fptt(optax.adam(1e-2)), 1e-6),
  ],
  ids=['Adam, alpha 0.1', 'Adam, alpha 0.5', 'momentum', 'tiny gradients'],
)
def test_a_stable_run_is_not_suspected(task, out, optimizer, weight):
  """At no time in 200 batches; nor where all gradients are tiny and λ, since Adam's
  steps are not, is 100 times above them.
  """
  loss, lambdas, grads = norms_of_a_run(*task, optimizer, 200, out, weight)
  assert np.isfinite(loss).all()
  assert (lambdas.max() > 100 * grads.max()) == (weight < 1)
  assert not any(
    fptt_jax.lambda_diverges(lambdas[:n], grads[:n]) for n in range(1, len(lambdas) + 1)
  )


@pytest.mark.parametrize(
  ('lambdas', 'grads', 'expected'),
  [
    (
      [0.5, 1.0, 150.1],
      [[1, 1], [1.5, NAN], [1e9, 0]],
      True,
    ),  # Above 100 times the 1.5 of the first two.
    ([0.5, 1.0, 149.9], [[1, 1], [1.5, NAN], [1e9, 0]], False),
    ([1.6, 1.0, 159.0], [[1, 1], [1.5, NAN], [1e9, 0]], False),  # Its own 1.6.
    ([1.0, 1.0, NAN], [[1], [1], [1]], True),
    ([INF], [[1]], True),
    ([1e9], [[1]], False),  # One batch tells nothing.
    ([0.0, 0.0], [[1], [1]], False),  # No fptt.
    ([0.0, 1.0], [[NAN], [1]], False),  # All skipped at first.
  ],
)
def test_criterion(lambdas, grads, expected):
  assert fptt_jax.lambda_diverges(lambdas, grads) is expected


@pytest.mark.parametrize(
  ('lambdas', 'grads'),
  [([], np.zeros((0, 2))), ([1.0], [1.0]), ([1.0, 2.0], [[1.0]]), (1.0, [[1.0]])],
)
def test_norms_of_other_shapes_are_refused(lambdas, grads):
  with pytest.raises(
    ValueError,
    match=r'lambda_norms and grad_norms must be',
  ):
    fptt_jax.lambda_diverges(lambdas, grads)
