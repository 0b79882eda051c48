"""Base class of the recurrent layers, and the scan of a per-step function.

A layer maps (state, x [S, B, D], mask [S, B] or None, key or None) to (state,
y [S, B, H]). Every layer defines one step, which :func:`scan_cell` runs. A layer may
also define the parts of its hand-written backward pass (:mod:`fptt_jax.nn._fused`),
which is faster and needs less memory.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

from flax import nnx
import jax
from jax import export
import jax.numpy as jnp

from fptt_jax._checks import (
  FLOAT32_MAX,
  Words,
  check_choice,
  check_dtype,
  check_number,
  check_size,
  require,
)
from fptt_jax._types import OwnStep
from fptt_jax.nn import _native, _native_own
from fptt_jax.nn._checks import check_batch_size, check_inputs, check_rngs, check_window
from fptt_jax.nn._fused import (
  FusedCell,
  WindowKernel,
  rounds_products,
  run_fused,
  varies,
)
from fptt_jax.nn._overrides import nearest
from fptt_jax.nn.kernels import cuda

Step = Callable[[Any, Any], tuple[Any, jax.Array]]
PRODUCTS = ('float32', 'bfloat16')
IMPLEMENTATIONS = ('auto', 'native', 'custom_vjp', 'scan', 'cuda')


def scan_cell(
  step: Step, state: Any, x: Any, mask: jax.Array | None
) -> tuple[Any, jax.Array]:
  """Run `step(state, x_t) -> (state, y_t)` over a window.

  Args:
    step: one time step.
    state: tree of arrays [B, ...].
    x: tree of arrays [S, ...], scanned over.
    mask: bool [S, B], or None if all steps are valid. Masked steps leave the state
      unchanged.

  Returns:
    (state after the window, y [S, B, ...]). y is undefined at masked steps.
  """

  def body(state: Any, inputs: tuple[Any, jax.Array | None]) -> tuple[Any, jax.Array]:
    x_t, mask_t = inputs
    new_state, y_t = step(state, x_t)
    # Inputs of a wider dtype would widen the state, which a scan does not allow.
    new_state = jax.tree.map(_cast_like, new_state, state)
    if mask_t is not None:
      new_state = jax.tree.map(
        lambda new, old: jnp.where(_add_axes(mask_t, new.ndim), new, old),
        new_state,
        state,
      )
    return new_state, y_t

  return jax.lax.scan(body, state, (x, mask))


def _cast_like(new: jax.Array, old: jax.Array) -> jax.Array:
  # PRNG keys have the same dtype and cannot be cast.
  return new if new.dtype == old.dtype else new.astype(old.dtype)


def _add_axes(mask: jax.Array, ndim: int) -> jax.Array:
  return mask.reshape((-1,) + (1,) * (ndim - 1))


def own_recurrence(
  gains: tuple[tuple[jax.Array | None, ...], ...], w_h: jax.Array, own_only: bool
) -> list[jax.Array]:
  """Return what each unit passes to itself through a recurrent matrix.

  Args:
    gains: derivatives [R, n] of a unit's m arrays with respect to its k sums.
    w_h: [n, k n], the matrix.
    own_only: whether to leave it out.

  Returns:
    m derivatives [R, n] of the arrays with respect to the unit's output before.
  """
  diagonals = [jnp.diagonal(part) for part in jnp.split(w_h, len(gains[0]), axis=1)]
  found = []
  for of_array in gains:
    terms = [
      gain * diagonal[None]
      for gain, diagonal in zip(of_array, diagonals, strict=True)
      if gain is not None
    ]
    total = sum(terms[1:], terms[0])
    found.append(jnp.zeros_like(total) if own_only else total)
  return found


class Recurrent(nnx.Module):
  """Base class of layers with H hidden units, whose state is one array h [B, H].

  Subclasses define `step`, and `initial_state` if their state is another one. A
  subclass with a hand-written backward pass also defines `_fused_cell`.

  Attributes:
    in_features: D.
    hidden_features: H.
    param_dtype: dtype of parameters and state.
    implementation: how a window runs.

      * 'auto': as 'native' where that is possible, else as 'custom_vjp'. One step of
        one sequence runs as 'scan', which is faster there.
      * 'native': all steps of a window in one kernel for the CPU, compiled at first use
        (:mod:`fptt_jax.nn.kernels.cpu`), with the same derivatives as 'custom_vjp'.
        :class:`LSTM`, :class:`GRU`, :class:`ElmanRNN` and :class:`AntisymmetricRNN`
        have one, for float32. Without a C++ compiler, in another dtype, for symbolic
        sizes and on an accelerator it warns once and runs as 'custom_vjp'. Programs
        exported by `jax.export` never hold the kernel.
      * 'custom_vjp': with the hand-written backward pass, if the layer has one. It is
        fast and small, and differentiable once, in reverse mode.
        A window of one step runs as 'scan' unless its products are rounded. Within
        `jax.shard_map` with `check_vma=True`, windows that vary over devices run as
        'scan', because JAX adds up gradients over devices by types there.
      * 'scan': the plain scan of `step`, which `jax.jvp` and second derivatives need.
      * 'cuda': the hand-written backward pass, all steps of a window in one CUDA kernel
        (:mod:`fptt_jax.nn.kernels.cuda`). Only :class:`LSTM` and :class:`GRU` have
        one, for float32 and H of 32, 64 or 128. The kernels have only run in emulation
        so far, so they are never the default.

    products: what the operands of products are rounded to, 'float32' or 'bfloat16'.
      Sums, state and parameters stay float32. None follows
      `jax.default_matmul_precision`. Only layers with a native kernel take it.

  Raises:
    ValueError: an argument is outside its range; inputs, state or mask have the wrong
      shape (when traced).
    TypeError: `rngs` has no stream for parameters; inputs have the wrong dtype (when
      traced).
  """

  _cuda_kernel: ClassVar[WindowKernel | None] = None
  _native_cell: ClassVar[_native.NativeCell | None] = None

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    param_dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
    implementation: str = 'auto',
    products: str | None = None,
  ):
    check_choice('implementation', implementation, IMPLEMENTATIONS)
    if products is not None:
      check_choice('products', products, PRODUCTS)
    check_rngs(rngs)
    self.in_features = check_size('in_features', in_features)
    self.hidden_features = check_size('hidden_features', hidden_features)
    self.param_dtype = check_dtype('param_dtype', param_dtype)
    self.implementation = implementation
    self.products = products
    self._check_implementation()
    self._check_products()

  @abc.abstractmethod
  def step(self) -> Step:
    """Return one time step as a function of (state, x_t [B, D]).

    It reads and prepares the weights, once per window.
    """

  def initial_state(self, batch_size: int) -> Any:
    """Return the state before the first step: zeros."""
    return self._zeros(batch_size, self.hidden_features)

  def __call__(
    self,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[Any, jax.Array]:
    """Run a window.

    Args:
      state: as `initial_state` makes it.
      x: inputs [S, B, D].
      mask: bool [S, B], or None if all steps are valid.
      key: not used; these layers draw no noise.

    Returns:
      (state after the window, y [S, B, H]). y is undefined at masked steps.
    """
    state, x = self._check_call(state, x, mask)
    native = self._choose_native(state, x, mask)
    if native is not None:
      return _native.run_native(*native, state, x, mask)
    products = self._choose_products()
    # A single step leaves no product to defer. A symbolic size may be any number.
    several_steps = export.is_symbolic_dim(x.shape[0]) or x.shape[0] > 1
    gains = several_steps or products == 'bfloat16' or self.implementation == 'cuda'
    fused = self._fused_cell() if gains and not self._runs_step() else None
    if fused is None:
      return scan_cell(self.step(), state, x, mask)
    if varies((fused[1], state, x, mask)):
      accepted = "False in jax.shard_map with products='bfloat16'"
      require(self.products != 'bfloat16', 'check_vma', accepted, True)
      return scan_cell(self.step(), state, x, mask)
    cell, weights = fused
    kernel = self._cuda_kernel if self.implementation == 'cuda' else None
    cell = cell._replace(kernel=kernel, products=products)
    return run_fused(cell, weights, state, x, mask)

  def _runs_step(self) -> bool:
    """Return whether a window runs `step`, step by step.

    It does on request, and where a subclass has a step of its own: all faster forms are
    of its parent's.
    """
    fast = min(nearest(self, '_fused_cell'), nearest(self, '__call__'))
    return self.implementation == 'scan' or nearest(self, 'step') < fast

  def _fused_cell(self) -> tuple[FusedCell, Any] | None:
    """Return the parts of the fused window and the weights they take, if any."""
    return None

  def own_step(self, state: Any, x_t: jax.Array, own_only: bool) -> OwnStep | None:
    """Return the derivatives of a step that stay within each unit.

    Args:
      state: m arrays [R, n].
      x_t: inputs [R, D].
      own_only: whether to leave out of the transition what a unit passes to itself
        through a recurrent matrix.

    Returns:
      The derivatives; None if the layer does not define them. They are then found by
      differentiating the step unit by unit.
    """
    return None

  def advance_own(
    self,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None,
    influence: dict[str, jax.Array],
    credit: dict[str, jax.Array],
    own_only: bool,
  ) -> dict[str, jax.Array]:
    """Advance the influence of parameters on their own units in a native kernel.

    Args:
      state: state before the window, m arrays [B, n].
      x: inputs [S, B, D].
      mask: bool [S, B], or None.
      influence: {name of a parameter: [B, ..., m, k n]}.
      credit: {name of a parameter: [..., k n]}, computed from the influence before.
      own_only: as in `own_step`.

    Returns:
      The influence after the window; empty where no kernel can run.
    """
    state, x = self._check_call(state, x, mask)
    native = self._choose_native(state, x, mask, single=True)
    if native is None or not _native_own.can_advance(*native, state, influence):
      return {}
    return _native_own.advance_own(*native, state, x, mask, influence, credit, own_only)

  def _last_output(self, state: Any) -> jax.Array | None:
    """Return the output [B, H] at each sequence's last valid step, or None.

    It is read from the state after that step, where the layer's output is a known part
    of the state.
    """
    # A subclass with its own call may return anything.
    if self._runs_step() or type(self).__call__ is not Recurrent.__call__:
      return None
    fused = self._fused_cell()
    return None if fused is None else fused[0].output(state)

  def _check_call(
    self, state: Any, x: jax.Array, mask: jax.Array | None
  ) -> tuple[Any, jax.Array]:
    """Return state and inputs of a window, checked.

    The state has the layer's own structure, and the inputs have its dtype.
    """
    x = check_inputs(self, x, self.in_features)
    state = check_window(self, state, x, mask)
    return state, x.astype(self.param_dtype)

  def _choose_native(
    self, state: Any, x: jax.Array, mask: jax.Array | None, single: bool = False
  ) -> tuple[_native.NativeCell, Any] | None:
    """Return the cell and the weights if a window runs in the native kernel.

    Args:
      state: state before the window.
      x: inputs [S, B, D].
      mask: bool [S, B], or None.
      single: whether one step of one sequence counts as a window.
    """
    cell = self._make_native_cell()
    if cell is None or self._runs_step() or self.implementation == 'cuda':
      return None
    cell = cell.with_products(self._choose_products())
    fused = self._fused_cell()
    assert fused is not None
    problem: str | None = "implementation='custom_vjp' never runs in the kernel"
    if self.implementation != 'custom_vjp':
      problem = _native.find_problem(cell, fused[1], state, x, mask)
    if problem is None:
      gains = single or self._native_gains(cell, x)
      return (cell, fused[1]) if gains else None
    if self.implementation == 'native':
      _native.warn_once(f"implementation='native' runs without the kernel: {problem}.")
    if self.products == 'bfloat16' and jax.default_backend() == 'cpu':
      _native.warn_once(f"products='bfloat16' is slower than 'float32': {problem}.")
    return None

  def _native_gains(self, cell: _native.NativeCell, x: jax.Array) -> bool:
    """Return whether the native kernel is wanted, or faster than the scan."""
    steps, batch, _ = x.shape
    # For a single row, arranging the weights takes longer than multiplying by them.
    single = steps * batch == 1 and cell.products == 'float32'
    return not single or self.implementation == 'native'

  def _make_native_cell(self) -> _native.NativeCell | None:
    """Return the native kernel of this layer, if any."""
    return self._native_cell

  def _choose_products(self) -> str | None:
    """Return the precision of products, None for what JAX does."""
    if self.products is not None or self._native_cell is None:
      return self.products
    return 'bfloat16' if rounds_products(self.param_dtype) else None

  def _check_products(self) -> None:
    """Raise if the layer cannot round the operands of its products."""
    name = type(self).__name__
    rounds = self.products == 'bfloat16'
    is_plain = self._runs_step() or self.implementation == 'cuda'
    fits = self._native_cell is not None and not is_plain
    accepted = f"None or 'float32' for {name} with {self.implementation!r}"
    require(fits or not rounds, 'products', accepted, self.products)
    fits = self.param_dtype == jnp.float32
    accepted = "float32 with products='bfloat16'"
    require(fits or not rounds, 'param_dtype', accepted, Words(self.param_dtype))

  def _check_implementation(self) -> None:
    """Raise if the layer has no kernel, or no CUDA kernel for its size and dtype."""
    name = type(self).__name__
    kernels = {'native': self._native_cell, 'cuda': self._cuda_kernel}
    has_kernel = kernels.get(self.implementation, name) is not None
    accepted = f"'auto', 'custom_vjp' or 'scan' for {name}, which has no such kernel"
    require(has_kernel, 'implementation', accepted, self.implementation)
    if self.implementation == 'cuda':
      cuda.check_supported(name, self.hidden_features, self.param_dtype)

  def _check_number(self, name: str, value: Any, low: float, expected: str) -> float:
    """Return a number that is at least `low` and finite in the layer's dtype."""
    return check_number(name, value, low, FLOAT32_MAX, expected, self.param_dtype)

  def _zeros(self, batch_size: int, features: int) -> jax.Array:
    """Return a part of the initial state [B, features]."""
    return jnp.zeros((check_batch_size(batch_size), features), self.param_dtype)
