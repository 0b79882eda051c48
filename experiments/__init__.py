"""Scripts that run the paper's experiments: `python -m experiments.NAME --help`.

`load_run(folder)` returns the model and the best parameters of a run that has ended.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from experiments.core.trained import TrainedRun, load_run

__all__ = ('TrainedRun', 'load_run')


def __getattr__(name: str) -> Any:
  """Return a public name, which is imported at its first use."""
  # The scripts start without the modules that reading a trained run needs.
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from experiments.core import trained

  return getattr(trained, name)
