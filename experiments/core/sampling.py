"""Text drawn from a trained language model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.core.trained import TrainedRun
from experiments.data import text
import fptt_jax


def sample_text(
  run: TrainedRun,
  number: int,
  *,
  prompt: str = '',
  temperature: float = 1.0,
  seed: int = 0,
) -> str:
  """Draw a text, token by token.

  Args:
    run: a trained language model.
    number: number of tokens to draw, characters or words.
    prompt: beginning of the text; without it the model starts after the end of a line.
    temperature: divisor of the logits; 0 takes the most probable token each time.
    seed: seed of the draws.

  Returns:
    The prompt and the tokens that were drawn after it.

  Raises:
    UserError: the prompt holds a token that is not in the vocabulary.
  """
  by_characters = run.config.by_characters
  vocabulary = run.vocabulary or []
  given = text.encode_prompt(prompt, vocabulary, by_characters)
  start = vocabulary.index(text.END_OF_LINE) if text.END_OF_LINE in vocabulary else 0
  tokens = jnp.asarray(given or [start], jnp.int32)
  draw = jax.jit(
    functools.partial(draw_tokens, run.model), static_argnames=('number', 'greedy')
  )
  drawn = draw(
    run.params,
    tokens,
    jax.random.key(seed),
    temperature or 1.0,  # Greedy draws do not use it; 0 would divide by zero.
    number=number,
    greedy=temperature == 0,
  )
  return text.decode_tokens([*given, *drawn.tolist()], vocabulary, by_characters)


def draw_tokens(
  model: fptt_jax.Model,
  params: Any,
  prompt: jax.Array,
  key: jax.Array,
  temperature: jax.typing.ArrayLike,
  *,
  number: int,
  greedy: bool = False,
) -> jax.Array:
  """Draw tokens after a prompt.

  Args:
    model: a model from token ids to logits.
    params: its parameters.
    prompt: int32 [P], P >= 1 tokens that the model reads first.
    key: PRNG key.
    temperature: divisor of the logits.
    number: number N of tokens to draw.
    greedy: whether to take the most probable token each time.

  Returns:
    int32 [N].
  """

  def read(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
    state, outputs = model.apply(params, state, tokens[:, None], None, None)
    if isinstance(outputs, fptt_jax.OutputsWithPenalty):
      outputs = outputs.outputs
    return state, outputs[-1, 0]

  def draw(
    carry: tuple[Any, jax.Array], key: jax.Array
  ) -> tuple[tuple[Any, jax.Array], jax.Array]:
    state, logits = carry
    if greedy:
      token = jnp.argmax(logits)
    else:
      token = jax.random.categorical(key, logits / temperature)
    return read(state, token[None]), token.astype(jnp.int32)

  start = read(model.initial_state(1), prompt)
  return jax.lax.scan(draw, start, jax.random.split(key, number))[1]
