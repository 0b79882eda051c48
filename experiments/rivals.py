"""The same FPTT by other means, for the benchmark: PyTorch, and flax without a scan
over windows.

Each function makes a `step(inputs [T, B, ...], targets)` that trains on one batch and
returns the windows' losses. All minimise what `fptt_jax` minimises there, clip the
regularized gradient to norm 1 and take Adam's steps. K has to divide T.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fptt_jax
from fptt_jax import nn

LR, CLIP, ALPHA, BETA = 1e-3, 1.0, 0.1, 0.5


class Case(NamedTuple):
  """What is trained, and its shape.

  Attributes:
    name: for tables.
    num_steps: T.
    num_windows: K.
    batch_size: B.
    features: D; for words the size of their embedding.
    hidden: H.
    outputs: C classes or V words; 1 for regression.
    words: whether it is a language model: tokens in, a label each step. Else terminal.
    batches: those of an epoch of the real task; 0 where an epoch's time is of no
      interest.
  """

  name: str
  num_steps: int
  num_windows: int
  batch_size: int
  features: int
  hidden: int
  outputs: int = 10
  words: bool = False
  batches: int = 0

  @property
  def size(self) -> int:
    """S."""
    return math.ceil(self.num_steps / self.num_windows)


def draw(case: Case) -> tuple[np.ndarray, np.ndarray]:
  """Inputs and targets, time-major."""
  rng = np.random.default_rng(0)
  steps = (case.num_steps, case.batch_size)
  if case.words:
    tokens = rng.integers(
      0, case.outputs, (case.num_steps + 1, case.batch_size)
    ).astype(np.int32)
    return tokens[:-1], tokens[1:]
  inputs = rng.uniform(size=(*steps, case.features)).astype(np.float32)
  if case.outputs == 1:
    return inputs, rng.uniform(size=case.batch_size).astype(np.float32)
  return inputs, rng.integers(0, case.outputs, case.batch_size).astype(np.int32)


def make_loss(case: Case) -> fptt_jax.Loss:
  """Cross-entropy or squared error, at each window's end times β, or at each word."""
  if case.words:
    return fptt_jax.losses.sequence_classification(case.outputs)
  if case.outputs == 1:
    return fptt_jax.losses.terminal_regression()
  return fptt_jax.losses.terminal_classification(case.outputs, divergence='none')


def make_model(case: Case, cell: Callable[[nnx.Rngs], Any]) -> fptt_jax.Model:
  """An embedding for words, the cell, a readout."""

  def build(rngs: nnx.Rngs) -> nn.Sequential:
    embedding = (
      [nnx.Embed(case.outputs, case.features, rngs=rngs)] if case.words else []
    )
    return nn.Sequential(
      *embedding, cell(rngs), nnx.Linear(case.hidden, case.outputs, rngs=rngs)
    )

  return nn.from_nnx(build)


def flax_cell(case: Case) -> Callable[[nnx.Rngs], Any]:
  """Flax's own LSTM."""
  return lambda rngs: nnx.OptimizedLSTMCell(case.features, case.hidden, rngs=rngs)


def make_optimizer() -> optax.GradientTransformation:
  """FPTT around clipped Adam."""
  return fptt_jax.fptt(
    optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(LR)), alpha=ALPHA, beta=BETA
  )


def flax_loop(case: Case, params: Any = None) -> Callable[..., Any]:
  """Flax's cell in a scan over the steps of a window, compiled; the windows in a Python
  loop. `params` are what it starts from.
  """
  model, optimizer = make_model(case, flax_cell(case)), make_optimizer()
  params = model.init(jax.random.key(0)) if params is None else params
  carry = [params, optimizer.init(params)]

  def loss(
    params: Any, hidden: Any, x: jax.Array, targets: jax.Array, beta: jax.Array
  ) -> tuple[jax.Array, Any]:
    hidden, outputs = model.apply(params, hidden, x, None, None)
    if case.words:
      return optax.losses.softmax_cross_entropy_with_integer_labels(
        outputs, targets
      ).mean(), hidden
    if case.outputs == 1:
      return beta * jnp.mean(jnp.square(outputs[-1, :, 0] - targets)), hidden
    return beta * optax.losses.softmax_cross_entropy_with_integer_labels(
      outputs[-1], targets
    ).mean(), hidden

  @jax.jit
  def window(
    params: Any,
    opt_state: Any,
    hidden: Any,
    inputs: jax.Array,
    targets: jax.Array,
    start: np.int32,
  ) -> tuple[Any, ...]:
    cut = lambda array: jax.lax.dynamic_slice_in_dim(array, start, case.size)
    x, labels, beta = (
      cut(inputs),
      cut(targets) if case.words else targets,
      (start + case.size) / case.num_steps,
    )
    (value, hidden), grads = jax.value_and_grad(loss, has_aux=True)(
      params, hidden, x, labels, beta
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, hidden, value

  def step(inputs: Any, targets: Any) -> list[jax.Array]:
    hidden, values = model.initial_state(case.batch_size), []
    for start in range(0, case.num_steps, case.size):
      *carry[:], hidden, value = window(
        *carry, hidden, inputs, targets, np.int32(start)
      )
      values.append(value)
    return jax.block_until_ready(values)

  return step


def tensors(inputs: np.ndarray, targets: np.ndarray, device: str) -> tuple[Any, Any]:
  """A batch as PyTorch wants it."""
  import torch

  x, labels = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
  return x, labels.long() if labels.dtype == torch.int32 else labels


def torch_loop(
  case: Case, kind: str, weights: Any = None, device: str = 'cpu'
) -> Callable[..., Any]:
  """PyTorch; the step takes what `tensors` makes.

  Args:
    case: what is trained.
    kind: 'plain': as people write it; 'optimized': without a host's look at each loss,
      updates of all parameters at once and a fused Adam; 'graph': as optimized, the
      whole batch captured as one CUDA graph and replayed.
    weights: parameters of `fptt_jax`'s model of the case to start from.
    device: 'cpu' or 'cuda'; 'graph' needs the latter.

  Raises:
    ImportError: PyTorch is not installed.
  """
  import torch

  optimized = kind != 'plain'
  embedding = (
    torch.nn.Embedding(case.outputs, case.features)
    if case.words
    else torch.nn.Identity()
  )
  lstm, readout = (
    torch.nn.LSTM(case.features, case.hidden),
    torch.nn.Linear(case.hidden, case.outputs),
  )
  parameters = [*embedding.parameters(), *lstm.parameters(), *readout.parameters()]
  if weights is not None:
    _load_torch(torch, weights, embedding, lstm, readout)
  lstm.bias_hh_l0.data.zero_()  # One bias, as there.
  lstm.bias_hh_l0.requires_grad_(False)
  for module in (embedding, lstm, readout):
    module.to(device)
  parameters = [parameter for parameter in parameters if parameter.requires_grad]
  adam = (
    torch.optim.Adam(parameters, LR, fused=True, capturable=kind == 'graph')
    if optimized
    else torch.optim.Adam(parameters, LR)
  )
  summary = [parameter.detach().clone() for parameter in parameters]
  lam = [torch.zeros_like(parameter) for parameter in parameters]

  def loss(outputs: Any, targets: Any, beta: float) -> Any:
    if case.words:
      return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    if case.outputs == 1:
      return beta * torch.nn.functional.mse_loss(outputs[:, 0], targets)
    return beta * torch.nn.functional.cross_entropy(outputs, targets)

  @torch.no_grad()
  def update_each() -> None:
    for parameter, wb, l in zip(parameters, summary, lam, strict=True):
      parameter.grad += -l + ALPHA * (parameter - wb)
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    adam.step()
    for parameter, wb, l in zip(parameters, summary, lam, strict=True):
      l -= ALPHA * (parameter - wb)
      wb.copy_((1 - BETA) * wb + BETA * parameter - BETA / ALPHA * l)

  @torch.no_grad()
  def update_all() -> None:
    grads = [parameter.grad for parameter in parameters]
    torch._foreach_sub_(grads, lam)
    torch._foreach_add_(grads, torch._foreach_sub(parameters, summary), alpha=ALPHA)
    torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
    adam.step()
    torch._foreach_sub_(lam, torch._foreach_sub(parameters, summary), alpha=ALPHA)
    torch._foreach_mul_(summary, 1 - BETA)
    torch._foreach_add_(summary, parameters, alpha=BETA)
    torch._foreach_sub_(summary, lam, alpha=BETA / ALPHA)

  update = update_all if optimized else update_each

  def windows(x: Any, labels: Any) -> list[Any]:
    hidden, values = None, []
    for start in range(0, case.num_steps, case.size):
      end = min(start + case.size, case.num_steps)
      outputs, hidden = lstm(embedding(x[start:end]), hidden)
      value = loss(
        readout(outputs if case.words else outputs[-1]),
        labels[start:end] if case.words else labels,
        end / case.num_steps,
      )
      adam.zero_grad(set_to_none=True)
      value.backward()
      update()
      hidden = tuple(part.detach() for part in hidden)
      values.append(value.detach() if optimized else value.item())
    return values

  run = (
    _captured(torch, windows, tensors(*draw(case), device))
    if kind == 'graph'
    else windows
  )

  def step(inputs: Any, targets: Any) -> list[float]:
    values = run(inputs, targets)
    return torch.stack(values).tolist() if optimized else values

  return step


def _captured(
  torch: Any, function: Callable[..., list[Any]], example: tuple[Any, ...]
) -> Callable[..., list[Any]]:
  """A function of tensors as one CUDA graph. It is run a few times first, as capturing
  asks: what it trains has moved by then.
  """
  places = [tensor.clone() for tensor in example]
  stream = torch.cuda.Stream()
  stream.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(stream):
    for _ in range(3):
      function(*places)
  torch.cuda.current_stream().wait_stream(stream)
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    values = function(*places)

  def run(*tensors: Any) -> list[Any]:
    for place, tensor in zip(places, tensors, strict=True):
      place.copy_(tensor)
    graph.replay()
    return values

  return run


def _load_torch(
  torch: Any, weights: Any, embedding: Any, lstm: Any, readout: Any
) -> None:
  """Puts the weights of a model of `make_model` with `fptt_jax.nn.LSTM` into torch's
  modules.
  """
  tensor = lambda array: torch.from_numpy(np.array(array))
  layers = [weights['layers'][number] for number in sorted(weights['layers'])]
  if len(layers) == 3:
    embedding.weight.data = tensor(layers[0]['embedding'])
  lstm.weight_ih_l0.data, lstm.weight_hh_l0.data = (
    tensor(layers[-2]['w_x'].T),
    tensor(layers[-2]['w_h'].T),
  )
  lstm.bias_ih_l0.data = tensor(layers[-2]['bias'])
  readout.weight.data, readout.bias.data = (
    tensor(layers[-1]['kernel'].T),
    tensor(layers[-1]['bias']),
  )
