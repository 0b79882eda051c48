"""FPTT in PyTorch, for the benchmark.

Each function makes a `step(inputs [T, B, ...], targets)`, which trains on one batch and
returns the losses of the windows. All systems minimize the same loss, clip the
regularized gradient to norm 1 and take Adam's steps. K must divide T.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmark.cases import ALPHA, BETA, CLIP, LR, Case, draw
from experiments.core import devices


def tensors(inputs: np.ndarray, targets: np.ndarray, device: str) -> tuple[Any, Any]:
  """Convert a batch to PyTorch's tensors.

  Args:
    inputs: inputs [T, B, ...].
    targets: labels or values.
    device: 'cpu' or 'cuda'.

  Returns:
    (inputs, targets) on the device.
  """
  import torch

  x = torch.from_numpy(inputs).to(device)
  labels = torch.from_numpy(targets).to(device)
  # PyTorch's cross-entropy takes 64-bit labels only.
  return x, labels.long() if labels.dtype == torch.int32 else labels


def torch_loop(
  case: Case, kind: str, weights: Any = None, device: str = 'cpu'
) -> Callable[..., Any]:
  """Return a train step in PyTorch, which takes the results of :func:`tensors`.

  Args:
    case: model and shapes.
    kind: 'plain' is the usual style. 'optimized' leaves the losses on the device,
      updates all parameters at once and uses a fused Adam. 'bfloat16' is 'optimized'
      with products in bfloat16, by automatic mixed precision. 'compiled' is 'optimized'
      with the model of a window compiled by `torch.compile`. 'graph' is 'optimized'
      with the whole batch captured as one CUDA graph and replayed.
    weights: parameters of `fptt_jax`'s model of the case to start from.
    device: 'cpu' or 'cuda'; 'graph' needs 'cuda'.

  Raises:
    ImportError: PyTorch is not installed.
  """
  import torch

  # Before a graph is captured, which keeps the precision of its products.
  _match_precision()
  optimized = kind != 'plain'
  modules = _make_modules(case, weights, device)
  parameters = modules.trained()
  # A captured Adam must keep its step count on the device.
  settings: dict[str, Any] = {}
  if optimized:
    settings = {'fused': True, 'capturable': kind == 'graph'}
  adam = torch.optim.Adam(parameters, LR, **settings)
  update = (_update_all if optimized else _update_each)(parameters, adam)
  loss = _make_loss(case)
  forward = _make_forward(case, modules)
  if kind == 'compiled':
    forward = torch.compile(forward)
  mixed = torch.autocast(device, torch.bfloat16, enabled=kind == 'bfloat16')

  def train(x: Any, labels: Any) -> list[Any]:
    hidden = None
    values = []
    for start in range(0, case.num_steps, case.size):
      end = min(start + case.size, case.num_steps)
      with mixed:
        outputs, hidden = forward(x[start:end], hidden)
        window_labels = labels[start:end] if case.words else labels
        value = loss(outputs, window_labels, end / case.num_steps)
      adam.zero_grad(set_to_none=True)
      value.backward()
      update()
      # FPTT differentiates a window at a time.
      hidden = tuple(part.detach() for part in hidden)
      # item() waits for the device at each window, as in most training scripts.
      values.append(value.detach() if optimized else value.item())
    return values

  is_graph = kind == 'graph'
  run = _captured(train, tensors(*draw(case), device)) if is_graph else train

  def step(inputs: Any, targets: Any) -> list[float]:
    values = run(inputs, targets)
    return torch.stack(values).tolist() if optimized else values

  return step


class _Modules(NamedTuple):
  """PyTorch's modules of a model.

  Attributes:
    embedding: embedding of words; the identity for other inputs.
    lstm: the LSTM.
    readout: the linear readout.
  """

  embedding: Any
  lstm: Any
  readout: Any

  def trained(self) -> list[Any]:
    """Return the parameters that are trained."""
    return [
      parameter
      for module in self
      for parameter in module.parameters()
      if parameter.requires_grad
    ]


def _make_modules(case: Case, weights: Any, device: str) -> _Modules:
  """Build the modules of a case.

  Args:
    case: the shapes.
    weights: parameters of `fptt_jax`'s model to start from; None keeps PyTorch's own.
    device: 'cpu' or 'cuda'.
  """
  import torch

  embedding = (
    torch.nn.Embedding(case.outputs, case.features)
    if case.words
    else torch.nn.Identity()
  )
  lstm = torch.nn.LSTM(case.features, case.hidden)
  readout = torch.nn.Linear(case.hidden, case.outputs)
  modules = _Modules(embedding, lstm, readout)
  if weights is not None:
    _load_weights(modules, weights)
  # PyTorch's LSTM has two biases, ours has one.
  bias: Any = lstm.bias_hh_l0
  bias.data.zero_()
  bias.requires_grad_(False)
  for module in modules:
    module.to(device)
  return modules


def _make_forward(
  case: Case, modules: _Modules
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """Return the model of a window, (x, hidden state) -> (outputs, hidden state)."""

  def forward(x: Any, hidden: Any) -> tuple[Any, Any]:
    outputs, hidden = modules.lstm(modules.embedding(x), hidden)
    return modules.readout(outputs if case.words else outputs[-1]), hidden

  return forward


def _load_weights(modules: _Modules, weights: Any) -> None:
  """Copy the weights of a model with `fptt_jax.nn.LSTM` into PyTorch's modules."""
  import torch

  def transposed(array: Any) -> Any:
    return torch.from_numpy(np.array(array.T))

  def vector(array: Any) -> Any:
    return torch.from_numpy(np.array(array))

  *embedding, lstm, readout = (
    weights['layers'][number] for number in sorted(weights['layers'])
  )
  if embedding:
    modules.embedding.weight.data = vector(embedding[0]['embedding'])
  # Both libraries have the order i, f, g, o of the gates, but PyTorch's matrices are
  # [outputs, inputs].
  modules.lstm.weight_ih_l0.data = transposed(lstm['w_x'])
  modules.lstm.weight_hh_l0.data = transposed(lstm['w_h'])
  modules.lstm.bias_ih_l0.data = vector(lstm['bias'])
  modules.readout.weight.data = transposed(readout['kernel'])
  modules.readout.bias.data = vector(readout['bias'])


def _make_loss(case: Case) -> Callable[[Any, Any, float], Any]:
  """Return the loss of a window, (outputs, targets, beta) -> tensor []."""
  from torch.nn import functional

  def loss(outputs: Any, targets: Any, beta: float) -> Any:
    if case.words:
      return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    if case.outputs == 1:
      return beta * functional.mse_loss(outputs[:, 0], targets)
    return beta * functional.cross_entropy(outputs, targets)

  return loss


def _update_each(parameters: list[Any], adam: Any) -> Callable[[], None]:
  """Return FPTT's update in the usual style, one parameter after the other.

  Args:
    parameters: the trained parameters, with their gradients.
    adam: the optimizer of the parameters.
  """
  import torch

  w_bar = [parameter.detach().clone() for parameter in parameters]
  lam = [torch.zeros_like(parameter) for parameter in parameters]

  def update() -> None:
    with torch.no_grad():
      for parameter, w, l in zip(parameters, w_bar, lam, strict=True):
        parameter.grad += -l + ALPHA * (parameter - w)
      torch.nn.utils.clip_grad_norm_(parameters, CLIP)
      adam.step()
      for parameter, w, l in zip(parameters, w_bar, lam, strict=True):
        l -= ALPHA * (parameter - w)
        w.copy_((1 - BETA) * w + BETA * parameter - BETA / ALPHA * l)

  return update


def _update_all(parameters: list[Any], adam: Any) -> Callable[[], None]:
  """Return FPTT's update in operations on all parameters at once.

  Args:
    parameters: the trained parameters, with their gradients.
    adam: the optimizer of the parameters.
  """
  import torch

  w_bar = [parameter.detach().clone() for parameter in parameters]
  lam = [torch.zeros_like(parameter) for parameter in parameters]

  def update() -> None:
    with torch.no_grad():
      # The public optimizers use the same operations; they save a launch per parameter.
      grads = [parameter.grad for parameter in parameters]
      torch._foreach_sub_(grads, lam)
      torch._foreach_add_(grads, torch._foreach_sub(parameters, w_bar), alpha=ALPHA)
      torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
      adam.step()
      torch._foreach_sub_(lam, torch._foreach_sub(parameters, w_bar), alpha=ALPHA)
      torch._foreach_mul_(w_bar, 1 - BETA)
      torch._foreach_add_(w_bar, parameters, alpha=BETA)
      torch._foreach_sub_(w_bar, lam, alpha=BETA / ALPHA)

  return update


def _captured(
  function: Callable[..., list[Any]], example: tuple[Any, ...]
) -> Callable[..., list[Any]]:
  """Return a function of tensors that replays one CUDA graph.

  Args:
    function: the function to capture. It is called several times first, so a train step
      has already changed its weights when this returns.
    example: arguments with the shapes to capture.
  """
  import torch

  # A graph reads and writes fixed addresses.
  places = [tensor.clone() for tensor in example]
  # PyTorch's documentation asks for warm-up calls on another stream, in which its
  # libraries allocate their work space.
  stream = torch.cuda.Stream()
  stream.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(stream):
    for _ in range(3):
      function(*places)
  torch.cuda.current_stream().wait_stream(stream)
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    values = function(*places)

  def run(*arguments: Any) -> list[Any]:
    for place, argument in zip(places, arguments, strict=True):
      place.copy_(argument)
    graph.replay()
    return values

  return run


def _match_precision() -> None:
  """Set the precision of PyTorch's products on a GPU to that of JAX."""
  import torch

  if devices.is_cpu():
    return
  config: Any = jax.config  # Its attributes are made at run time.
  precision = config.jax_default_matmul_precision
  # cuDNN, which runs the LSTM, has a switch of its own.
  torch.backends.cuda.matmul.allow_tf32 = precision != 'float32'
  torch.backends.cudnn.allow_tf32 = precision != 'float32'


def with_threads(step: Callable[..., Any], threads: int) -> Callable[..., Any]:
  """Return a step that sets PyTorch's number of threads before each call.

  Args:
    step: the step.
    threads: the number of threads.
  """
  import torch

  def run(*data: Any) -> Any:
    # The number is global, and systems with other numbers take turns with this one.
    torch.set_num_threads(threads)
    return step(*data)

  return run
