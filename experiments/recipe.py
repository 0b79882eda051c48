"""The settings all experiments share: training method, FPTT's hyper-parameters, optimiser."""

from collections.abc import Callable
import dataclasses
import math
import warnings

import jax
import optax

from experiments.options import check, checked, option
import fptt_jax

METHODS = tuple(fptt_jax.METHODS)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a model is trained, apart from the task."""

  method: tuple[str, ...] = option(('fptt',), f'methods to train by, one after the other: {", ".join(METHODS)}')
  seeds: tuple[int, ...] = option((0,), 'seeds, one run each: 0,1,2 or 0:3')
  num_windows: int | None = option(None, 'K, updates a sequence; default round(sqrt(T)), for methods that do not fix it')
  final_steps: int | None = option(None, "k of method 'tbptt_final': the last steps that are differentiated; default min(300, T)")
  alpha: float = option(0.5, 'strength of the tie of W to its summary')
  alpha_warmup: int = option(
    0, 'windows over which alpha grows linearly from a tenth ("starting small, gradually increased"); 0 for none'
  )
  beta: float = option(0.5, 'mixing of the summary')
  kappa: float = option(1.0, 'scale of the quadratic term')
  rho: float = option(0.0, 'fades the linear term')
  correction: str = option('eq6', 'coefficient of the previous gradient: 1 (Eq. 6) or 1/2 (Eq. 4)', ('eq6', 'eq4'))
  gradient_estimate: str = option('running', 'estimate of the gradient at the new weights', ('running', 'explicit', 'lagged'))
  inner_steps: int = option(1, 'gradient steps a window')
  optimizer: str = option('adam', 'base optimiser', ('adam', 'sgd'))
  lr: float = option(1e-3, 'learning rate')
  momentum: float = option(0.0, "heavy-ball momentum of 'sgd'")
  weight_decay: float = option(0.0, 'added to the gradient times the weights, after clipping')
  clip: float = option(0.0, 'largest global norm of the gradient; 0 does not clip')
  clip_regulariser: bool = option(True, 'clip loss plus regulariser, as the release does, rather than the loss gradient alone')
  devices: int = option(
    0, "devices to split a batch over; 0 chooses: all of an accelerator's, a CPU's cores where that was seen to pay, or 1"
  )
  evaluate_at: str = option('w', 'evaluate at the weights or at their summary (fptt only)', ('w', 'w_bar'))

  def __post_init__(self) -> None:
    check(bool(self.method) and set(self.method) <= set(METHODS), 'method', self.method, f'out of {", ".join(METHODS)}')
    check(bool(self.seeds) and min(self.seeds, default=-1) >= 0, 'seeds', self.seeds, 'integers >= 0')
    check(self.num_windows is None or self.num_windows >= 1, 'num_windows', self.num_windows, 'at least 1')
    check(len(set(self.method)) == len(self.method), 'method', self.method, 'named once each')
    check(len(set(self.seeds)) == len(self.seeds), 'seeds', self.seeds, 'different from each other')
    check(self.final_steps is None or self.final_steps >= 1, 'final_steps', self.final_steps, 'at least 1')
    check(0 < self.lr < math.inf, 'lr', self.lr, 'a finite number > 0')
    check(0 <= self.momentum < 1, 'momentum', self.momentum, 'in [0, 1)')
    check(self.momentum == 0 or self.optimizer == 'sgd', 'momentum', self.momentum, '0 unless --optimizer=sgd')
    check(0 <= self.weight_decay < math.inf, 'weight_decay', self.weight_decay, 'a finite number >= 0')
    check(self.alpha_warmup >= 0, 'alpha_warmup', self.alpha_warmup, 'an integer >= 0')
    check(self.devices >= 0, 'devices', self.devices, 'an integer >= 0')
    check(0 <= self.clip < math.inf, 'clip', self.clip, 'a finite number >= 0')
    inside = self.clip_regulariser or not self.clip or self.gradient_estimate != 'explicit'
    check(inside, 'clip_regulariser', self.clip_regulariser, 'true with --gradient_estimate=explicit, whose lambda is not clipped')
    with warnings.catch_warnings():  # Raises on FPTT options of no meaning; warnings come when it is used.
      warnings.simplefilter('ignore')
      regularise(self, optax.sgd(self.lr))

  def check_length(self, seq_len: int) -> None:
    """Raises if K or final_steps do not fit sequences of `seq_len` steps."""
    fptt_jax.cut(seq_len, num_windows=self.num_windows)
    check((self.final_steps or 1) <= seq_len, 'final_steps', self.final_steps, f'at most T={seq_len}')


def regularise(recipe: Recipe, base: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """FPTT around `base` with the recipe's hyper-parameters."""
  warmup = optax.linear_schedule(recipe.alpha / 10, recipe.alpha, recipe.alpha_warmup) if recipe.alpha_warmup else None
  return fptt_jax.fptt(
    base,
    alpha=warmup or recipe.alpha,
    beta=recipe.beta,
    kappa=recipe.kappa,
    rho=recipe.rho,
    correction=recipe.correction,
    gradient_estimate=recipe.gradient_estimate,
    inner_steps=recipe.inner_steps,
  )


def make_optimizer(recipe: Recipe, method: str, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """The chain of clipping, weight decay, base optimiser and regulariser for one method.

  Its state holds 'learning_rate', which may be set.

  Warns when FPTT's own recursion would grow: the advisor's radius at the initial learning rate is above 1.
  """
  regularised = fptt_jax.METHODS[method].regularised
  if recipe.optimizer == 'sgd':
    base = optax.inject_hyperparams(optax.sgd)(learning_rate=learning_rate, momentum=recipe.momentum)
    if regularised and recipe.gradient_estimate == 'running':
      warn_if_unstable(recipe)
  else:
    base = optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)
  if recipe.weight_decay:
    base = optax.chain(optax.add_decayed_weights(recipe.weight_decay), base)
  clip = optax.clip_by_global_norm(recipe.clip) if recipe.clip else optax.identity()
  if not regularised:
    return optax.chain(clip, base)
  if recipe.clip_regulariser:
    return regularise(recipe, optax.chain(clip, base))
  return optax.chain(clip, regularise(recipe, base))


def warn_if_unstable(recipe: Recipe) -> None:
  """Warns when FPTT with SGD at these settings is unstable even where the loss is flat."""
  settings = dict(kappa=recipe.kappa, beta=recipe.beta, rho=recipe.rho, correction=recipe.correction, momentum=recipe.momentum)
  radius = fptt_jax.stability(recipe.lr, recipe.alpha, **settings)
  if radius > 1:
    warnings.warn(
      f'FPTT with SGD at lr={recipe.lr:g}, alpha={recipe.alpha:g}, {settings} is unstable even on a flat loss: its linearised '
      f'recursion has spectral radius {radius:.2f} > 1. Lower lr * alpha.',
      stacklevel=2,
    )


def make_trainer(
  recipe: Recipe,
  method: str,
  model: fptt_jax.Model,
  loss: fptt_jax.Loss,
  learning_rate: optax.ScalarOrSchedule,
  seq_len: int,
  *,
  mesh: jax.sharding.Mesh | None = None,
  carry_hidden: bool = False,
  wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda optimizer: optimizer,
) -> fptt_jax.Trainer:
  """The trainer of one method; `wrap` goes around its optimiser. `mesh` as :func:`choose_mesh` gives it."""
  setting = fptt_jax.METHODS[method]
  return fptt_jax.trainer(
    model,
    loss,
    wrap(make_optimizer(recipe, method, learning_rate)),
    method=method,
    num_windows=recipe.num_windows if setting.num_windows is None else None,
    carry_hidden=carry_hidden,
    inner_steps=recipe.inner_steps,
    final_steps=(recipe.final_steps or min(300, seq_len)) if setting.final_steps_only else None,
    mesh=mesh,
  )


def choose_mesh(recipe: Recipe, batch_size: int, hidden: int) -> jax.sharding.Mesh | None:
  """The devices to split batches over, None for one.

  Raises:
    UserError: more devices than there are, or a batch size that is no multiple of them.
  """
  devices = jax.local_devices()
  if recipe.devices:
    checked(check, recipe.devices <= len(devices), 'devices', recipe.devices, f'at most the {len(devices)} there are')
    checked(check, batch_size % recipe.devices == 0, 'devices', recipe.devices, f'a divisor of the batch size, {batch_size}')
    devices = devices[: recipe.devices]
  elif batch_size % len(devices) or (devices[0].platform == 'cpu' and not pays_on_cpu(batch_size, hidden)):
    devices = devices[:1]
  return jax.sharding.Mesh(devices, ('batch',)) if len(devices) > 1 else None


def pays_on_cpu(batch_size: int, hidden: int) -> bool:
  """Whether half a batch on each of two cores is quicker than XLA's own use of both.

  Seen for LSTMs of H = 128 and 256, B = 20 to 128; not at H = 1024, where each core would read all weights, nor at B = 8, H = 16,
  where the devices mostly wait for each other.
  """
  return hidden <= 512 and batch_size * hidden >= 4096


def updates_a_sequence(recipe: Recipe, method: str, seq_len: int) -> tuple[int, int]:
  """(K, optimiser updates) of one sequence of `seq_len` steps."""
  setting = fptt_jax.METHODS[method]
  if setting.num_windows is None:
    num_windows = fptt_jax.cut(seq_len, num_windows=recipe.num_windows).num_windows
  else:
    num_windows = seq_len if setting.num_windows == 'T' else int(setting.num_windows)
  return num_windows, (num_windows if setting.update_each_window else 1) * recipe.inner_steps


def evaluation_params(recipe: Recipe, method: str, state: fptt_jax.TrainState) -> jax.typing.ArrayLike:
  """The parameters to evaluate at."""
  if recipe.evaluate_at == 'w_bar' and fptt_jax.METHODS[method].regularised:
    return fptt_jax.fptt_eval_params(state.opt_state, state.params)
  return state.params
