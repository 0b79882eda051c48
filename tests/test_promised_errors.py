"""Errors that docstrings promise and that no test of another file raises."""

from collections.abc import Callable

from flax import nnx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fptt_jax
from fptt_jax import losses, nn

LOSS = losses.terminal_regression()
FPTT = fptt_jax.fptt(optax.sgd(0.1))
PARAMS = {'w': np.ones(2, np.float32)}


def torch_layer(number: int, gates: int) -> dict[str, np.ndarray]:
  """The arrays of a layer of torch with two inputs and two units."""
  size = 2 * gates
  return {
    f'weight_ih_l{number}': np.zeros((size, 2)),
    f'weight_hh_l{number}': np.zeros((size, 2)),
    f'bias_ih_l{number}': np.zeros(size),
    f'bias_hh_l{number}': np.zeros(size),
  }


def abstract_batch() -> fptt_jax.Batch:
  return jax.eval_shape(
    lambda: jax.tree.map(jnp.asarray, helpers.regression_batch(4, 2))
  )


def update(gradient: dict[str, jax.Array]) -> None:
  FPTT.update(gradient, FPTT.init(PARAMS), PARAMS)


def complex_parameters() -> None:
  optimizer = fptt_jax.fptt(optax.sgd(0.1), state_dtype=jnp.float32)
  optimizer.init({'w': jnp.ones(2, jnp.complex64)})


def scan_with_axes(rngs: nnx.Rngs) -> nnx.Module:
  return nnx.RNN(nnx.GRUCell(1, 2, rngs=rngs), state_axes={nnx.Param: 0})


def dropout_of_floats() -> None:
  layer = nn.EmbeddingDropout(nnx.Embed(3, 2, rngs=nnx.Rngs(0)), 0.1)
  layer((), jnp.ones((2, 2)), None, jax.random.key(0))


CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
  'validate an abstract batch': (
    lambda: fptt_jax.validate_batch(abstract_batch(), LOSS),
    TypeError,
    'batch must be of concrete arrays',
  ),
  'a global batch of an abstract one': (
    lambda: fptt_jax.make_global_batch(
      abstract_batch(), LOSS, jax.sharding.Mesh(jax.devices()[:1], ('batch',))
    ),
    TypeError,
    'batch must be of concrete arrays',
  ),
  'gradients of another structure': (
    lambda: update({'v': jnp.ones(2)}),
    ValueError,
    r"^grads, params and state\.w_bar .*'v'",
  ),
  'gradients of another shape': (
    lambda: update({'w': jnp.ones(3)}),
    ValueError,
    r'^grads, params .*\(3,\)',
  ),
  'complex gradients': (
    lambda: update({'w': jnp.ones(2, jnp.complex64)}),
    TypeError,
    'all real or all complex.*complex64',
  ),
  'a real state of complex parameters': (
    complex_parameters,
    TypeError,
    'state_dtype must be None for complex64',
  ),
  'a class in place of a layer': (
    lambda: nn.Sequential(nn.LSTM),
    TypeError,
    r'layers must be modules or functions.*LSTM',
  ),
  'a scan with state_axes': (
    lambda: nn.from_nnx(scan_with_axes),
    TypeError,
    'state_axes of nnx.RNN',
  ),
  'layers of two kinds': (
    lambda: nn.from_torch(torch_layer(0, 4) | torch_layer(1, 3)),
    ValueError,
    'layers of one kind and size',
  ),
  'a bias of another size': (
    lambda: nn.from_torch(torch_layer(0, 4) | {'bias_ih_l0': np.zeros(5)}),
    ValueError,
    r'biases must be \[8\], got .*5',
  ),
  'weights of integers': (
    lambda: nn.from_torch(torch_layer(0, 4) | {'weight_ih_l0': np.zeros((8, 2), int)}),
    TypeError,
    'weight_ih_l0 .*int64',
  ),
  'a list of weights': (
    lambda: nn.from_torch([1]),
    TypeError,
    'state_dict must be of type',
  ),
  'dropout of embedded floats': (
    dropout_of_floats,
    TypeError,
    'tokens must be integers',
  ),
}


@pytest.mark.parametrize(('call', 'error', 'message'), CALLS.values(), ids=CALLS)
def test_promised_errors(
  call: Callable[[], object], error: type[Exception], message: str
) -> None:
  with pytest.raises(error, match=message):
    call()
