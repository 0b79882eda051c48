"""Scripts that run the paper's experiments: `python -m experiments.NAME --help`.

`load_run(folder)` gives the model and the best parameters of a run that has ended.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from experiments.core.trained import TrainedRun, load_run

__all__ = ('TrainedRun', 'load_run')


def __getattr__(name: str) -> Any:
  """Import what trained runs need when it is asked for: scripts start without it."""
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from experiments.core import trained

  return getattr(trained, name)
