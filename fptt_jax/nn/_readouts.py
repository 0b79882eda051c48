"""Readouts of language models that share the embedding's matrix E [V, E].

The embedding passed in is the module that embeds the words. The adapters count a shared
parameter once, and its gradient is the sum of both uses.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from fptt_jax._checks import check_size, check_type
from fptt_jax._dtypes import widen
from fptt_jax.nn._checks import check_inputs, check_rngs
from fptt_jax.nn._regularization import LockedDropout, Stateless


class TiedReadout(nnx.Module):
  """Compute the logits x Eᵀ + b of each step.

  Parameters: `bias` [V], initially 0, and the embedding's.

  Args:
    embed: the embedding of V words with E features.

  Raises:
    TypeError: `embed` is not an `nnx.Embed`.

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> def build(rngs):
    ...   embed = nnx.Embed(50, 200, rngs=rngs)
    ...   lstm = nn.LSTM(200, 200, rngs=rngs)
    ...   return nn.Sequential(embed, lstm, nn.TiedReadout(embed))
    >>> model = nn.from_nnx(build)

  References:
    Press and Wolf, "Using the Output Embedding to Improve Language Models", EACL 2017.
    Inan, Khosravi and Socher, "Tying Word Vectors and Word Classifiers", ICLR 2017.
  """

  def __init__(self, embed: nnx.Embed):
    check_type('embed', embed, nnx.Embed)
    self.embed = embed
    self.bias = nnx.Param(jnp.zeros(embed.num_embeddings, embed.param_dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Map features [S, B, E] to logits [S, B, V]."""
    x = check_inputs(self, x, self.embed.features)
    return self.embed.attend(x) + self.bias[None, None]


class MixtureOfSoftmaxes(Stateless):
  r"""Compute log-probabilities of a mixture of M softmaxes over V words.

  .. math::

    \pi = \mathrm{softmax}(x W_\pi), \quad z_m = \tanh(x W_m + b_m), \quad
    p = \sum_m \pi_m\, \mathrm{softmax}(E z_m + b)

  The outputs are log p, computed as a logsumexp of log-softmaxes; the authors' release
  adds 1e-8 to p instead. Their own logsumexp is 0, so they serve as logits of
  `fptt_jax.losses.sequence_classification`.

  The layer makes arrays [S, B, M, V], each 90 MB at S=24, B=6, M=15, V=10,000 in
  float32, and training keeps some for the backward pass. A trainer's `readout_chunk`
  limits S.

  Parameters: `prior` [H, M], `latent` [H, M·E] with bias, output `bias` [V], and the
  embedding's.

  Args:
    in_features: H.
    embed: the embedding of V words with E features.
    experts: M.
    dropout: rate of the locked dropout on the latents z [1, B, M·E] (`dropoutl` in the
      authors' release).
    rngs: source of the initial parameters.

  Raises:
    ValueError: a size is below 1, or the rate is outside [0, 1).
    TypeError: `embed` is not an `nnx.Embed`, or `rngs` has no stream for parameters.

  Example:
    >>> from flax import nnx
    >>> from fptt_jax import nn
    >>> def build(rngs):
    ...   embed = nnx.Embed(50, 20, rngs=rngs)
    ...   readout = nn.MixtureOfSoftmaxes(30, embed, experts=3, rngs=rngs)
    ...   return nn.Sequential(embed, nn.LSTM(20, 30, rngs=rngs), readout)
    >>> model = nn.from_nnx(build)

  References:
    Yang, Dai, Salakhutdinov and Cohen, "Breaking the Softmax Bottleneck: A High-Rank
    RNN Language Model", ICLR 2018.
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
    check_type('embed', embed, nnx.Embed)
    check_rngs(rngs)
    self.in_features = check_size('in_features', in_features)
    self.experts = check_size('experts', experts)
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
    """Map features [S, B, H] to log-probabilities [S, B, V] of at least float32."""
    x = check_inputs(self, x, self.in_features)
    state, z = self.dropout(state, jnp.tanh(self.latent(x)), mask, key)
    # One product gives all experts' latents.
    z = z.reshape(*x.shape[:2], self.experts, self.embed.features)
    logits = self.embed.attend(z) + self.bias[None, None, None]
    # Sums of exponentials over V words need more than 16 bits.
    log_pi = jax.nn.log_softmax(widen(self.prior(x)))
    log_p = jax.nn.log_softmax(widen(logits))
    return state, jax.nn.logsumexp(log_pi[..., None] + log_p, axis=-2)
