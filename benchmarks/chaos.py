"""Kills a run a hundred times, many of them during a save, and compares it with an undisturbed run.

  python benchmarks/chaos.py --kills 100
  python benchmarks/chaos.py --kills 30 --bucket s3     in a bucket of an emulator; or --bucket gs

The network is `batchnorm` at a sixteenth of its width, on the embedded digits; for a bucket its first two
stages, which start sooner, with checkpoints and evaluations as often as the emulator keeps up with.

The last line is one JSON object: the number of kills, of those after which the run was equal, and of those
that left an incomplete checkpoint, on the disk or in the bucket.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile

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
IN_BUCKET = (
  '--config.transfer.layer=pool2',
  '--config.checkpoint_every_steps=16',
  '--config.eval_every_steps=16',
)


def main() -> int:
  """Prints one line per kill, and one JSON object."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--bucket', choices=['gs', 's3'])
  options = parser.parse_args()
  with contextlib.ExitStack() as stack:
    bucket = None
    if options.bucket:
      from emulators import BUCKET, server

      stack.enter_context(server(options.bucket))
      os.environ['ALEXNET_FLAX_CACHE'] = stack.enter_context(tempfile.TemporaryDirectory())
      bucket = f'{options.bucket}://{BUCKET}'
    say = functools.partial(print, flush=True)
    flags = (*FLAGS, *IN_BUCKET) if bucket else FLAGS
    proof = verify_resume(flags, options.kills, seed=options.seed, say=say, bucket=bucket)
  for difference in proof.differences:
    print(f'different: {difference}')
  print(f'compared: {proof.compared}')
  names = ['kills', 'equal', 'inside_save', *(['inside_upload'] if options.bucket else [])]
  print(json.dumps({name: getattr(proof, name) for name in names}))
  return 0 if proof.equal == proof.kills else 1


if __name__ == '__main__':
  sys.exit(main())
