"""Recurrent layers that run a whole window at a time.

Each layer's call is (state, x [S, B, D], mask [S, B] or None, key or None) -> (state, y
[S, B, H]). A layer says what one step is, and :func:`scan_train_steps` runs it: plain,
and differentiable in every way. Layers that can also say how a step is taken apart
(:mod:`fptt_jax.nn.fused`) run faster, and are differentiable once, in reverse.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from flax import nnx
import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from fptt_jax._checks import (
  FLOAT32_MAX,
  FLOAT32_TINY,
  check_choice,
  check_dtype,
  check_flag,
  check_number,
  check_size,
)
from fptt_jax._dtypes import at_least_float32
from fptt_jax._types import OutputsWithPenalty
from fptt_jax._windows import take_steps
from fptt_jax.nn.checks import check_batch_size, check_inputs, check_rngs, check_window
from fptt_jax.nn.fused import (
  GRU_CELL,
  LSTM_CELL,
  RNN_CELL,
  FusedCell,
  WindowKernel,
  antisymmetric_cell,
  fused_window,
)
from fptt_jax.nn.kernels import GRU_WINDOW, LSTM_WINDOW, check_kernel

Step = Callable[[Any, Any], tuple[Any, jax.Array]]
INITS = ('torch', 'flax')


class LSTMState(NamedTuple):
  """Hidden state of :class:`LSTM`: output h and memory c, each [B, H] (torch's order;
  flax's cells carry (c, h)).
  """

  h: jax.Array
  c: jax.Array


def scan_cell(
  step: Step, state: Any, x: Any, mask: jax.Array | None
) -> tuple[Any, jax.Array]:
  """Runs `step(state, x_t) -> (state, y_t)` over a window; masked steps leave the state
  as it is.

  Args:
    step: one time step.
    state: tree of arrays [B, ...].
    x: tree of arrays [S, ...], scanned over.
    mask: bool [S, B], or None where all steps are real.

  Returns:
    (state after the window, y [S, B, ...]); y at masked steps has no meaning.
  """

  def body(state: Any, inputs: tuple[Any, jax.Array | None]) -> tuple[Any, jax.Array]:
    x_t, mask_t = inputs
    new_state, y_t = step(state, x_t)
    # Inputs may be of more bits. Keys have no other dtype to be cast to.
    new_state = jax.tree.map(
      lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype),
      new_state,
      state,
    )
    if mask_t is not None:
      keep = lambda new, old: jnp.where(
        mask_t.reshape(-1, *[1] * (new.ndim - 1)), new, old
      )
      new_state = jax.tree.map(keep, new_state, state)
    return new_state, y_t

  return jax.lax.scan(body, state, (x, mask))


class Recurrent(nnx.Module):
  """A layer of H hidden units that carries one array h [B, H]; subclasses give `step`
  (and another `initial_state`).

  Attributes:
    fused: whether windows run taken apart, where the layer knows how (`taken_apart`):
      quicker and smaller, but differentiable only once, in reverse. False: always the
      plain scan of `step`, which `jax.jvp` and second derivatives need. 'kernel': taken
      apart too, all steps of a window in one CUDA kernel (:mod:`fptt_jax.nn.kernels`),
      where the layer has one: :class:`LSTM` and :class:`GRU`, float32, H 32, 64 or 128.
      It is never chosen unasked, because it has not run on a GPU yet, only in
      emulation.
    window: the kernel, if the layer has one.

  Raises:
    ValueError, TypeError: an argument of a layer that means nothing (where it is made);
      inputs, state or mask of other shapes or dtypes than the layer's (when traced).
  """

  window: ClassVar[WindowKernel | None] = None

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    param_dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
    fused: bool | str = True,
  ):
    if not isinstance(fused, bool | np.bool_) and not (
      isinstance(fused, str) and fused == 'kernel'
    ):
      raise ValueError(f"fused must be True, False or 'kernel', got {fused!r}.")
    if fused == 'kernel' and self.window is None:
      raise ValueError(
        "fused='kernel' expected a layer that has a kernel, LSTM or GRU, got "
        f'{type(self).__name__}.'
      )
    check_rngs(rngs)
    self.in_features = check_size('in_features', in_features)
    self.hidden_features = check_size('hidden_features', hidden_features)
    self.param_dtype = check_dtype('param_dtype', param_dtype)
    if fused == 'kernel':
      check_kernel(type(self).__name__, self.hidden_features, self.param_dtype)
    self.fused = fused

  def number(self, name: str, value: Any, low: float, expected: str) -> float:
    """A number of at least `low`, and no more than the layer's dtype holds."""
    return check_number(name, value, low, FLOAT32_MAX, expected, self.param_dtype)

  def zeros(self, batch_size: int, features: int) -> jax.Array:
    """A part of the state before the first step [B, features]."""
    return jnp.zeros((check_batch_size(batch_size), features), self.param_dtype)

  def initial_state(self, batch_size: int) -> Any:
    """The state before the first step: zeros."""
    return self.zeros(batch_size, self.hidden_features)

  def checked(self, state: Any, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Inputs [S, B, D] in the layer's dtype, after a look at all that a window is
    given.
    """
    x = check_inputs(self, x, self.in_features)
    check_window(self, state, x, mask)
    return x.astype(self.param_dtype)

  @abc.abstractmethod
  def step(self) -> Step:
    """One time step as a function of (state, x_t [B, D]); reads the weights, and
    prepares them, once a window.
    """

  def taken_apart(self) -> tuple[FusedCell, Any] | None:
    """The same step for :func:`fptt_jax.nn.fused.fused_window`, and its weights; None
    where there is only `step`.
    """
    return None

  def last_output(self, state: Any) -> jax.Array | None:
    """The output [B, H] at each sequence's last valid step, out of the state after it;
    None where that may not tell.
    """
    apart = (
      self.taken_apart()
      if self.fused and type(self).__call__ is Recurrent.__call__
      else None
    )
    return None if apart is None else apart[0].output(state)

  def __call__(
    self,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[Any, jax.Array]:
    """Runs a window; see the module's docstring. `key` is not used: these layers have
    no noise of their own.
    """
    x = self.checked(state, x, mask)
    # One step leaves nothing to put off. A symbolic number of steps may be any number.
    several_steps = export.is_symbolic_dim(x.shape[0]) or x.shape[0] > 1
    apart = (
      self.taken_apart()
      if self.fused == 'kernel' or (self.fused and several_steps)
      else None
    )
    if apart is None:
      return scan_cell(self.step(), state, x, mask)
    cell, weights = apart
    return fused_window(
      cell._replace(window=self.window) if self.fused == 'kernel' else cell,
      weights,
      state,
      x,
      mask,
    )


class LSTM(Recurrent):
  r"""Long short-term memory (Hochreiter and Schmidhuber 1997, with forget gates), as
   `torch.nn.LSTM` computes it.

  .. math::

    (i, f, g, o) = x W_x + h W_h + b, \quad c' = \sigma(f) c + \sigma(i) \tanh(g), \quad
    h' = \sigma(o) \tanh(c')

  Parameters: `w_x` [D, 4H], `w_h` [H, 4H], `bias` [4H], gates in the order i, f, g, o:
  4H(D + H + 1) numbers (torch's two biases are one sum).

  Args:
    in_features: D.
    hidden_features: H.
    init: 'torch': all uniform in ±1/√H (the bias a sum of two such); 'flax': `w_x`
      LeCun normal, `w_h` orthogonal for each gate, bias 0.
    forget_bias: the initial value of the forget gate's bias, in place of what `init`
      says. 1 keeps long memories from the start.
    fused: see :class:`Recurrent`.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters.
  """

  window = LSTM_WINDOW

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    init: str = 'torch',
    forget_bias: float | None = None,
    fused: bool | str = True,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs, fused)
    w_x, w_h, biases = _gates(self, init, 4, rngs)
    bias = biases[0] + biases[1]
    if forget_bias is not None:
      value = self.number(
        'forget_bias', forget_bias, -FLOAT32_MAX, 'a finite number or None'
      )
      bias = bias.at[self.hidden_features : 2 * self.hidden_features].set(value)
    self.w_x, self.w_h, self.bias = nnx.Param(w_x), nnx.Param(w_h), nnx.Param(bias)

  def initial_state(self, batch_size: int) -> LSTMState:
    """Zeros."""
    return LSTMState(*(self.zeros(batch_size, self.hidden_features) for _ in range(2)))

  def step(self) -> Step:
    """See the class."""
    w_x, w_h, bias = self.w_x[...], self.w_h[...], self.bias[None]

    def step(state: LSTMState, x_t: jax.Array) -> tuple[LSTMState, jax.Array]:
      i, f, g, o = jnp.split(x_t @ w_x + state.h @ w_h + bias, 4, axis=-1)
      c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
      h = jax.nn.sigmoid(o) * jnp.tanh(c)
      return LSTMState(h, c), h

    return step

  def taken_apart(self) -> tuple[FusedCell, Any]:
    """See :class:`Recurrent`."""
    return LSTM_CELL, (self.w_x[...], self.w_h[...], self.bias[...])


class GRU(Recurrent):
  r"""Gated recurrent unit (Cho et al. 2014), as `torch.nn.GRU` computes it.

  .. math::

    r = \sigma(x W_{xr} + h W_{hr} + b_r), \quad z = \sigma(x W_{xz} + h W_{hz} + b_z),
    \quad n = \tanh(x W_{xn} + b_{xn} + r (h W_{hn} + b_{hn})), \quad h' = (1 - z) n + z
    h

  Parameters: `w_x` [D, 3H], `w_h` [H, 3H], `bias` [3H] and `recurrent_bias` [3H], gates
  in the order r, z, n. Only the last third of `recurrent_bias` is not redundant.

  Args:
    in_features: D.
    hidden_features: H.
    init: 'torch' or 'flax', as for :class:`LSTM`.
    recurrent_bias: whether there is a second bias; without it b_hn = 0.
    fused: see :class:`Recurrent`.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters.
  """

  window = GRU_WINDOW

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    init: str = 'torch',
    recurrent_bias: bool = True,
    fused: bool | str = True,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs, fused)
    w_x, w_h, biases = _gates(self, init, 3, rngs)
    self.w_x, self.w_h, self.bias = nnx.Param(w_x), nnx.Param(w_h), nnx.Param(biases[0])
    self.recurrent_bias = (
      nnx.Param(biases[1]) if check_flag('recurrent_bias', recurrent_bias) else None
    )

  def step(self) -> Step:
    """See the class."""
    w_x, w_h, bias = self.w_x[...], self.w_h[...], self.bias[None]
    recurrent_bias = (
      jnp.zeros_like(bias) if self.recurrent_bias is None else self.recurrent_bias[None]
    )

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
      x_r, x_z, x_n = jnp.split(x_t @ w_x + bias, 3, axis=-1)
      h_r, h_z, h_n = jnp.split(h @ w_h + recurrent_bias, 3, axis=-1)
      r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
      n = jnp.tanh(x_n + r * h_n)
      h = (1 - z) * n + z * h
      return h, h

    return step

  def taken_apart(self) -> tuple[FusedCell, Any]:
    """See :class:`Recurrent`."""
    recurrent_bias = (
      jnp.zeros_like(self.bias[...])
      if self.recurrent_bias is None
      else self.recurrent_bias[...]
    )
    return GRU_CELL, (self.w_x[...], self.w_h[...], self.bias[...], recurrent_bias)


class ElmanRNN(Recurrent):
  """Elman's network with tanh: h' = tanh(x W_x + h W_h + b), as `torch.nn.RNN` computes
  it.

  Parameters: `w_x` [D, H], `w_h` [H, H], `bias` [H]. Arguments as for :class:`LSTM`.
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    init: str = 'torch',
    fused: bool | str = True,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs, fused)
    w_x, w_h, biases = _gates(self, init, 1, rngs)
    self.w_x, self.w_h, self.bias = (
      nnx.Param(w_x),
      nnx.Param(w_h),
      nnx.Param(biases[0] + biases[1]),
    )

  def step(self) -> Step:
    """See the class."""
    w_x, w_h, bias = self.w_x[...], self.w_h[...], self.bias[None]

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
      h = jnp.tanh(x_t @ w_x + h @ w_h + bias)
      return h, h

    return step

  def taken_apart(self) -> tuple[FusedCell, Any]:
    """See :class:`Recurrent`."""
    return RNN_CELL, (self.w_x[...], self.w_h[...], self.bias[...])


class AntisymmetricRNN(Recurrent):
  r"""AntisymmetricRNN with gating (Chang, Chen, Haber and Chi, ICLR 2019, Eq. 14).

  .. math::

    A = W - W^\top - \gamma I, \quad z = \sigma(A h + x V_z + b_z), \quad h' = h +
    \epsilon\, z \tanh(A h + x V_h + b_h)

  Only the strict upper triangle of W matters and only it is stored. Parameters: `w`
  [H(H-1)/2], `v` [D, 2H] and `bias` [2H], first the part of tanh, then that of the
  gate.

  Args:
    in_features: D.
    hidden_features: H.
    epsilon: ε > 0, step size.
    gamma: γ >= 0, diffusion.
    w_scale: σ_w; W's entries start normal with variance σ_w²/H, V's with variance 1/D,
      biases 0.
    fused: see :class:`Recurrent`.
    param_dtype: dtype of parameters and state.
    rngs: source of the initial parameters.
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    epsilon: float = 0.01,
    gamma: float = 0.01,
    w_scale: float = 1.0,
    fused: bool | str = True,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(in_features, hidden_features, param_dtype, rngs, fused)
    self.epsilon = self.number('epsilon', epsilon, FLOAT32_TINY, 'a finite number > 0')
    self.gamma = self.number('gamma', gamma, 0, 'a finite number >= 0')
    w_scale = self.number('w_scale', w_scale, 0, 'a finite number >= 0')
    inputs, size = self.in_features, self.hidden_features
    normal = jax.nn.initializers.normal
    self.w = nnx.Param(
      normal(w_scale * size**-0.5)(
        rngs.params(), (size * (size - 1) // 2,), param_dtype
      )
    )
    self.v = nnx.Param(
      normal(inputs**-0.5)(rngs.params(), (inputs, 2 * size), param_dtype)
    )
    self.bias = nnx.Param(jnp.zeros(2 * size, param_dtype))

  def step(self) -> Step:
    """See the class."""
    a_transposed, v, bias, epsilon = (
      self._a_transposed(),
      self.v[...],
      self.bias[None],
      self.epsilon,
    )

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
      recurrent = h @ a_transposed
      from_x, from_x_gate = jnp.split(x_t @ v + bias, 2, axis=-1)
      h = h + epsilon * jax.nn.sigmoid(recurrent + from_x_gate) * jnp.tanh(
        recurrent + from_x
      )
      return h, h

    return step

  def taken_apart(self) -> tuple[FusedCell, Any]:
    """See :class:`Recurrent`."""
    return antisymmetric_cell(self.epsilon), (
      self.v[...],
      self._a_transposed(),
      self.bias[...],
    )

  def _a_transposed(self) -> jax.Array:
    """Aᵀ [H, H]: h is a row, (A h)ᵀ = hᵀ Aᵀ."""
    size = self.hidden_features
    upper = (
      jnp.zeros((size, size), self.w[...].dtype)
      .at[jnp.triu_indices(size, 1)]
      .set(self.w[...])
    )
    return (upper - upper.T).T - self.gamma * jnp.eye(size, dtype=upper.dtype)


class FromCell(nnx.Module):
  """Runs a per-step cell of flax's protocol over windows.

  Args:
    cell: an `nnx.Module`, (carry, x_t [B, D]) -> (carry, y_t), with
      `initialize_carry(input_shape, rngs)`. It may be one of flax's cells or a module
      with several of them and a readout inside. `initialize_carry` is given (B, D),
      where D is the cell's `in_features`. A cell without `in_features` is given (B, 1),
      so that its carry may not depend on D.

  Raises:
    TypeError: `cell` is no such module, its carry depends on features it does not tell,
      or it owns random streams.
  """

  def __init__(self, cell: Any):
    if not isinstance(cell, nnx.Module) or not hasattr(cell, 'initialize_carry'):
      raise TypeError(
        'a per-step cell must be an nnx.Module with initialize_carry, got '
        f'{type(cell).__name__}.'
      )
    if jax.tree.leaves(nnx.state(cell, nnx.RngState)):
      raise TypeError(
        f'a per-step cell may not own random streams, got {type(cell).__name__}, which '
        'does: put noise between layers instead.'
      )
    self.cell = cell
    features = getattr(cell, 'in_features', None)
    self.in_features = features if isinstance(features, int) else None
    if self.in_features is None:
      _check_carry_without_features(cell)

  def initial_state(self, batch_size: int) -> Any:
    """Returns the cell's own initial carry."""
    features = 1 if self.in_features is None else self.in_features
    return self.cell.initialize_carry(
      (check_batch_size(batch_size), features), nnx.Rngs(0)
    )

  def __call__(
    self,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[Any, jax.Array]:
    """Runs a window step by step."""
    if self.in_features is not None:
      x = check_inputs(self, x, self.in_features)
    check_window(self, state, x, mask)
    return scan_cell(self.cell, state, x, mask)


def _check_carry_without_features(cell: Any) -> None:
  """Raises a TypeError if the carry of a cell without `in_features` depends on the
  inputs' features.
  """
  shapes = []
  for features in (1, 2):
    try:
      carry = jax.eval_shape(
        lambda size=features: cell.initialize_carry((2, size), nnx.Rngs(0))
      )
    except Exception as error:
      raise TypeError(
        f'initialize_carry of {type(cell).__name__} failed for the input shape (2, '
        f'{features}): {error} Give the cell '
        'an attribute in_features, the D of its inputs [B, D].'
      ) from error
    shapes.append(carry)
  if shapes[0] != shapes[1]:
    raise TypeError(
      'a per-step cell whose carry depends on D, the features of its inputs [B, D], '
      'must tell them as in_features, got '
      f'{type(cell).__name__} without.'
    )


def without_own_loop(layer: Any) -> Any:
  """Returns the cell of an `nnx.RNN`, whose own loop would restart it in each window;
  other layers as they are.

  Raises:
    TypeError: the loop runs backward in time, or has parameters of their own for each
      step.
  """
  if isinstance(layer, nnx.Bidirectional):
    raise TypeError(
      'nnx.Bidirectional reads later steps, which no window forward through time has: '
      'use its forward cell alone, such '
      'as nn.LSTM(in_features, hidden_features, rngs=rngs).'
    )
  if not isinstance(layer, nnx.RNN):
    return layer
  if layer.reverse:
    raise TypeError(
      'nnx.RNN(reverse=True) reads later steps, which no window forward through time '
      'has: leave out reverse.'
    )
  if any(isinstance(axis, int) for axis in layer.state_axes.values()):
    raise TypeError(
      f'nnx.RNN(state_axes={layer.state_axes}) has its own state for each step, which '
      'no window has.'
    )
  return layer.cell


class LearnedInitialState(nnx.Module):
  """A recurrent layer whose state before the first step is trained with its parameters.

  One initial state is learned for all sequences: each floating-point array [B, ...] of
  the layer's state gets a parameter [...], which starts as the layer's own initial
  state does (mostly zeros). Integers in the state, such as counters, start as before.

  The gradient reaches it from the windows in which sequences start: the first one, all
  windows of 'ftrl' and 'bptt_aux', with `carry_hidden` the first window after `init`
  and `end_epoch`; with 'tbptt_final' only where all steps are differentiated.

  Args:
    layer: what runs windows, or a per-step cell of flax.

  Raises:
    TypeError: `layer` is neither, or has no floating-point state.

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> model = nn.from_nnx(lambda rngs: nn.Sequential(nn.LearnedInitialState(nn.LSTM(1, 16, rngs=rngs)), nnx.Linear(16, 3, rngs=rngs)))
  """

  def __init__(self, layer: Any):
    self.layer = as_windowed(layer)
    leaves = jax.tree.leaves(self.layer.initial_state(1))
    self.initial = nnx.List(
      [nnx.Param(jnp.asarray(leaf)[0]) for leaf in leaves if _is_float(leaf)]
    )
    if not self.initial:
      raise TypeError(
        'layer must have a floating-point state, whose start can be learned, got '
        f'{type(self.layer).__name__}.'
      )

  def initial_state(self, batch_size: int) -> Any:
    """Makes the learned state before the first step, the same for each row."""
    leaves, structure = jax.tree.flatten(self.layer.initial_state(batch_size))
    learned = iter(self.initial)
    rows = [
      jnp.broadcast_to(next(learned)[...], leaf.shape) if _is_float(leaf) else leaf
      for leaf in leaves
    ]
    return jax.tree.unflatten(structure, rows)

  def last_output(self, state: Any) -> jax.Array | None:
    """See :class:`Recurrent`."""
    return self.layer.last_output(state) if isinstance(self.layer, Recurrent) else None

  def __call__(
    self,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[Any, jax.Array | OutputsWithPenalty]:
    """Runs a window as the layer does."""
    result: tuple[Any, jax.Array | OutputsWithPenalty] = self.layer(state, x, mask, key)
    return result


def _is_float(leaf: Any) -> bool:
  return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


class Sequential(nnx.Module):
  """Layers one after the other: recurrent ones, flax's per-step cells, `nnx.Dropout`,
  and anything that acts on each step alone (`nnx.Embed`, `nnx.Linear`, an activation
  function). Of an `nnx.RNN` its cell is taken, whose carry becomes part of the state.

  The first layer may be one of your own that takes a tree of inputs (tokens and
  features, say) and returns one array.

  Its state is a tuple of the recurrent layers' states. Dropout layers draw a fresh mask
  for each step and unit and are off in evaluation (key None). Penalties that layers
  return with their outputs (:class:`fptt_jax.OutputsWithPenalty`) are summed. The
  layers at its end that act on each step alone are its readout, which the trainer may
  run on a few steps at a time (`readout_chunk`).

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> language_model = nn.from_nnx(lambda rngs: nn.Sequential(
    ...   nnx.Embed(10_000, 256, rngs=rngs), nnx.Dropout(0.2),
    ...   nn.LSTM(256, 256, rngs=rngs), nnx.Dropout(0.2),
    ...   nnx.Linear(256, 10_000, rngs=rngs)))
  """

  def __init__(self, *layers: Any):
    if not layers:
      raise ValueError('a Sequential needs at least one layer, got none.')
    for layer in layers:
      if isinstance(layer, type) or not callable(layer):
        raise TypeError(
          f'layers of a Sequential must be modules or functions, got {layer!r}.'
        )
    layers = tuple(without_own_loop(layer) for layer in layers)
    self.layers = nnx.List(
      [FromCell(layer) if _is_cell(layer) else layer for layer in layers]
    )

  def initial_state(self, batch_size: int) -> tuple[Any, ...]:
    """The recurrent layers' initial states."""
    return tuple(
      layer.initial_state(batch_size) for layer in self.layers if is_recurrent(layer)
    )

  def __call__(
    self,
    state: tuple[Any, ...],
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
    last: jax.Array | int | None = None,
  ) -> tuple[tuple[Any, ...], jax.Array | OutputsWithPenalty]:
    """Runs a window through all layers; those after the last recurrent one at `last`
    alone, if given.

    `last` is each sequence's last valid step, an int or int [B].
    """
    last_recurrent = max(
      (number for number, layer in enumerate(self.layers) if is_recurrent(layer)),
      default=-1,
    )
    new_state, x, penalties = self._run(0, last_recurrent + 1, state, x, mask, key)
    if last is not None:
      layer: Any = self.layers[last_recurrent]
      # Outputs that nobody reads need not be written down, nor their gradient.
      output = (
        layer.last_output(new_state[-1])
        if isinstance(layer, Recurrent | LearnedInitialState)
        else None
      )
      x = take_steps(x, last) if output is None else output[None]
    _, x, _ = self._run(last_recurrent + 1, len(self.layers), (), x, mask, key)
    return new_state, _penalised(x, penalties)

  @property
  def readout_start(self) -> int:
    """The number of the first of the layers at the end that act on each step alone:
    together they are the readout.
    """
    start = len(self.layers)
    while start > 0 and _acts_on_steps(self.layers[start - 1]):
      start -= 1
    return start

  def features(
    self,
    state: tuple[Any, ...],
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[Any, ...], jax.Array | OutputsWithPenalty]:
    """Runs a window up to the readout."""
    new_state, x, penalties = self._run(0, self.readout_start, state, x, mask, key)
    return (*new_state, *state[len(new_state) :]), _penalised(x, penalties)

  def readout(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The rest, for any steps of a window: what `features` gives [s, B, ...] -> outputs
    [s, B, ...].
    """
    layer: Any
    for number in range(self.readout_start, len(self.layers)):
      layer = self.layers[number]
      if is_recurrent(layer):
        _, x = layer(layer.initial_state(x.shape[1]), x, None, _layer_key(key, number))
      elif isinstance(layer, nnx.Linear):
        # As rows [s B, D]: of [s, B, D], XLA copies the outputs' gradient, transposed,
        # for that of the weights.
        x = layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], layer.out_features)
      else:
        x = layer(x)
    return x

  def _run(
    self,
    start: int,
    end: int,
    state: tuple[Any, ...],
    x: jax.Array,
    mask: jax.Array | None,
    key: jax.Array | None,
  ) -> tuple[tuple[Any, ...], jax.Array, list[jax.Array]]:
    """Runs a window through some of the layers: (new states, outputs, penalties)."""
    states, new_states, penalties = iter(state), [], []
    layer: Any
    for number in range(start, end):
      layer = self.layers[number]
      layer_key = _layer_key(key, number)
      if is_recurrent(layer):
        new_state, y = layer(next(states), x, mask, layer_key)
        new_states.append(new_state)
        if isinstance(y, OutputsWithPenalty):
          penalties.append(y.penalty)
        x = y.outputs if isinstance(y, OutputsWithPenalty) else y
      elif isinstance(layer, nnx.Dropout):
        x = layer(x, deterministic=layer_key is None, rngs=layer_key)
      else:
        x = layer(x)
    return tuple(new_states), x, penalties


def _layer_key(key: jax.Array | None, number: int) -> jax.Array | None:
  return None if key is None else jax.random.fold_in(key, number)


def _penalised(
  x: jax.Array, penalties: list[jax.Array]
) -> jax.Array | OutputsWithPenalty:
  return OutputsWithPenalty(x, sum(penalties[1:], penalties[0])) if penalties else x


def is_recurrent(layer: Any) -> bool:
  """Whether `layer` runs windows: (state, x, mask, key) -> (state, y), with
  `initial_state(batch_size)`; () is a state too.
  """
  return hasattr(layer, 'initial_state')


def _acts_on_steps(layer: Any) -> bool:
  """Whether `layer` acts on each step alone, so that it does the same to a few steps of
  a window as to all.
  """
  if is_recurrent(layer):
    return bool(getattr(layer, 'in_readout', False))
  draws = isinstance(layer, nnx.Module) and jax.tree.leaves(
    nnx.state(layer, nnx.RngState)
  )
  return not draws and not isinstance(layer, nnx.Dropout)


def _is_cell(layer: Any) -> bool:
  return hasattr(layer, 'initialize_carry') and not is_recurrent(layer)


def as_windowed(module: nnx.Module) -> Any:
  """`module` itself if it runs windows, lifted if it is a per-step cell or an `nnx.RNN`
  around one.
  """
  module = without_own_loop(module)
  if isinstance(module, nnx.Module) and is_recurrent(module):
    return module
  if isinstance(module, nnx.Module) and _is_cell(module):
    return FromCell(module)
  raise TypeError(
    'expected a recurrent module (initial_state(batch_size), called with (state, x, '
    'mask, key)) or a per-step cell '
    f'(initialize_carry), got {type(module).__name__}; put layers without state into a '
    'fptt_jax.nn.Sequential.'
  )


def _gates(
  layer: Recurrent, init: str, num_gates: int, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
  """Initial (w_x [D, gates·H], w_h [H, gates·H], two biases [gates·H]) as torch or flax
  draw them.
  """
  check_choice('init', init, INITS)
  in_features, hidden_features, dtype = (
    layer.in_features,
    layer.hidden_features,
    layer.param_dtype,
  )
  width = num_gates * hidden_features
  if init == 'torch':
    bound = hidden_features**-0.5
    shapes = [(in_features, width), (hidden_features, width), (width,), (width,)]
    w_x, w_h, *biases = (
      jax.random.uniform(rngs.params(), shape, dtype, -bound, bound) for shape in shapes
    )
    return w_x, w_h, biases
  normal, orthogonal = (
    jax.nn.initializers.lecun_normal(),
    jax.nn.initializers.orthogonal(),
  )
  input_kernels = [
    normal(rngs.params(), (in_features, hidden_features), dtype)
    for _ in range(num_gates)
  ]
  shape, wide = (
    (hidden_features, hidden_features),
    at_least_float32(dtype),
  )  # Fewer bits cannot be made orthogonal.
  kernels = [
    orthogonal(rngs.params(), shape, wide).astype(dtype) for _ in range(num_gates)
  ]
  return (
    jnp.concatenate(input_kernels, -1),
    jnp.concatenate(kernels, -1),
    [jnp.zeros(width, dtype), jnp.zeros(width, dtype)],
  )
