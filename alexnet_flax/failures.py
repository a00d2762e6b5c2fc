"""What a run leaves of a step at which it broke: the state before it, and the examples of its batch."""

import json
import pathlib

import jax
import orbax.checkpoint as ocp

from alexnet_flax import checkpoint
from alexnet_flax.data import order
from alexnet_flax.run import Run
from alexnet_flax.steps import TrainState


def record(folder: pathlib.Path, state: TrainState, step: int, what: str, run: Run) -> pathlib.Path:
  """Writes `folder`/failures/STEP: `state/` (Orbax), and `batch.json` with the step and its examples.

  Args:
    folder: of the run.
    state: before the step.
    step: that broke.
    what: was found.
    run: of which it is.

  Returns:
    The folder written.
  """
  place = (folder / 'failures' / str(step)).resolve()
  config, source = run.config, run.train_source
  chosen = order.batch_indices(config.seed, step - 1, config.data.batch_size, source.num_examples)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(place / 'state', checkpoint.saved_tree(state), force=True)
  if jax.process_index() == 0:
    names = [example.name for example in source.read(chosen)]
    examples = [{'index': index, 'name': name} for index, name in zip(chosen.tolist(), names, strict=True)]
    rate = float(run.schedule(step - 1))
    found = {'step': step, 'what': what, 'learning_rate': rate, 'data': source.name, 'examples': examples}
    (place / 'batch.json').write_text(json.dumps(found, indent=1) + '\n')
  return folder / 'failures' / str(step)
