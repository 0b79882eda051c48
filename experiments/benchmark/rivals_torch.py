"""The same FPTT by other means, for the benchmark: PyTorch, and flax without a scan
over windows.

Each function makes a `step(inputs [T, B, ...], targets)` that trains on one batch and
returns the windows' losses. All minimise what `fptt_jax` minimises there, clip the
regularized gradient to norm 1 and take Adam's steps. K has to divide T.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmark.cases import ALPHA, BETA, CLIP, LR, Case, draw
from experiments.core import devices


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


def with_threads(step: Callable[..., Any], threads: int) -> Callable[..., Any]:
  """Sets PyTorch's threads before each call, and its precision on a GPU to JAX's."""
  import torch

  if not devices.is_cpu():
    exact = jax.config.jax_default_matmul_precision == 'float32'
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact

  def run(*data: Any) -> Any:
    torch.set_num_threads(threads)
    return step(*data)

  return run
