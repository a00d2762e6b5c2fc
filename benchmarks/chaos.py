"""Kills a run a hundred times, most of them during a save, and compares it with an undisturbed run.

  python benchmarks/chaos.py --kills 100

The network is `batchnorm` at a sixteenth of its width, on the embedded digits. The last line is one JSON
object: the number of kills, of those after which the run was bit-equal, and of those that left an
incomplete checkpoint.
"""

import argparse
import json
import sys

from alexnet_flax.diagnostics.verify_resume import verify_resume

FLAGS = (
  '--config=configs/digits.py',
  '--config.model.width=0.0625',
  '--config.model.image_size=57',
  '--config.total_steps=160',
  '--config.optimizer.warmup_steps=10',
  '--config.checkpoint_every_steps=8',
  '--config.eval_every_steps=80',
  '--config.log_every_steps=16',
)


def main() -> int:
  """Prints one line per kill, and one JSON object."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  proof = verify_resume(FLAGS, options.kills, seed=options.seed, say=lambda line: print(line, flush=True))
  for difference in proof.differences:
    print(f'different: {difference}')
  print(f'compared: {proof.compared}')
  print(json.dumps({'kills': proof.kills, 'equal': proof.equal, 'inside_save': proof.inside_save}))
  return 0 if proof.equal == proof.kills else 1


if __name__ == '__main__':
  sys.exit(main())
