"""Computing on concrete arrays while another function is traced."""

from collections.abc import Callable
from typing import Any

import jax


def concrete(function: Callable[..., Any]) -> Callable[..., Any]:
  """Return a function that computes at once, even where it is called under a trace.

  It is compiled for the shapes of its first call. `jax.ensure_compile_time_eval` alone
  does not do: old releases of JAX cannot lower a scan within it.

  Args:
    function: A pure function of concrete arrays.
  """
  jitted = jax.jit(function)
  compiled: Any = None

  def run(*args: Any) -> Any:
    nonlocal compiled
    if compiled is None:
      compiled = jitted.lower(*args).compile()
    return compiled(*args)

  return run
