"""Readouts of language models that share the embedding's matrix E [V, E] (Press and
Wolf 2017; Inan et al. 2017).

The embedding given is the very one the words went in by: the adapters count a shared
parameter once, its gradient is the sum of both uses.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import check_size
from fptt_jax._dtypes import at_least_float32
from fptt_jax.nn._checks import check_embed, check_inputs, check_rngs
from fptt_jax.nn._regularization import LockedDropout, Stateless


class TiedReadout(nnx.Module):
  """Logits x Eᵀ + b of each step.

  Parameters: `bias` [V], from 0, beside the embedding's.

  Args:
    embed: the embedding, V words of E features.

  Raises:
    TypeError: it is no embedding.

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> def build(rngs):
    ...   embed = nnx.Embed(50, 200, rngs=rngs)
    ...   return nn.Sequential(embed, nn.LSTM(200, 200, rngs=rngs), nn.TiedReadout(embed))
    >>> model = nn.from_nnx(build)
  """

  def __init__(self, embed: nnx.Embed):
    check_embed(embed)
    self.embed = embed
    self.bias = nnx.Param(jnp.zeros(embed.num_embeddings, embed.param_dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Features x [S, B, E] -> logits [S, B, V]."""
    return (
      self.embed.attend(check_inputs(self, x, self.embed.features))
      + self.bias[None, None]
    )


class MixtureOfSoftmaxes(Stateless):
  r"""A mixture of M softmaxes over the V words (Yang, Dai, Salakhutdinov and Cohen,
   ICLR 2018).

  .. math::

    \pi = \mathrm{softmax}(x W_\pi), \quad z_m = \tanh(x W_m + b_m), \quad
    p = \sum_m \pi_m\, \mathrm{softmax}(E z_m + b)

  Its outputs are log p, computed as logsumexp of log-softmaxes (the release adds 1e-8
  to p instead). As log-probabilities their own logsumexp is 0, so they serve as logits
  for `fptt_jax.losses.sequence_classification` unchanged.

  It makes arrays [S, B, M, V], 90 MB each at S=24, B=6, M=15, V=10,000 in float32, and
  training keeps some for the backward pass, unless the trainer computes a few steps at
  a time (its `readout_chunk`).

  Parameters: `prior` [H, M], `latent` [H, M·E] with bias, output `bias` [V], beside the
    embedding's.

  Args:
    in_features: H.
    embed: the embedding, V words of E features.
    experts: M.
    dropout: rate of the locked dropout on the latents z [1, B, M·E] (the release's
      `dropoutl`).
    rngs: source of the initial parameters.

  Raises:
    ValueError: sizes below 1, a rate outside [0, 1).
    TypeError: `embed` is no embedding, or `rngs` no source of parameters.
  """

  in_readout = True

  def __init__(
    self,
    in_features: int,
    embed: nnx.Embed,
    experts: int,
    *,
    dropout: float = 0.0,
    rngs: nnx.Rngs,
  ):
    check_embed(embed)
    check_rngs(rngs)
    self.in_features, self.experts = (
      check_size('in_features', in_features),
      check_size('experts', experts),
    )
    self.embed = embed
    dtype = embed.param_dtype
    self.prior = nnx.Linear(
      self.in_features, self.experts, use_bias=False, param_dtype=dtype, rngs=rngs
    )
    self.latent = nnx.Linear(
      self.in_features, self.experts * embed.features, param_dtype=dtype, rngs=rngs
    )
    self.dropout = LockedDropout(dropout)
    self.bias = nnx.Param(jnp.zeros(embed.num_embeddings, dtype))

  def __call__(
    self,
    state: tuple[()],
    x: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[()], jax.Array]:
    """Features x [S, B, H] -> log-probabilities [S, B, V], at least float32."""
    x = check_inputs(self, x, self.in_features)
    state, z = self.dropout(state, jnp.tanh(self.latent(x)), mask, key)
    z = z.reshape(*x.shape[:2], self.experts, self.embed.features)
    logits = self.embed.attend(z) + self.bias[None, None, None]
    log_pi, log_p = _log_softmax(self.prior(x)), _log_softmax(logits)
    return state, jax.nn.logsumexp(log_pi[..., None] + log_p, axis=-2)


def _log_softmax(logits: jax.Array) -> jax.Array:
  return jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)))
