"""How alike are networks that differ by their seed? RSA and linear CKA between runs, by layer.

  python benchmarks/seeds.py RUN RUN [RUN ...] [--data_dir DIR] [--images 500]

The runs are those of one configuration, such as runs/NAME/seed-*; the images are the first of their test
split. Writes results/seeds.json, of which docs/results.md makes its table and figure.
"""

import argparse
import pathlib

import numpy as np

from alexnet_flax.data.image_header import decode_pixels
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.files import write_json
from alexnet_flax.inference.features import features
from alexnet_flax.inference.representations import similarity_between_runs
from alexnet_flax.pretrained import load_pretrained, run_data
from alexnet_flax.training.workdir import environment

RESULTS = pathlib.Path('results/seeds.json')
MEASURES = ('rsa-spearman', 'cka')


def main() -> None:
  """Compares the runs, prints a line for each layer, and writes the record."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('runs', nargs='+')
  parser.add_argument('--data_dir')
  parser.add_argument('--images', type=int, default=500)
  options = parser.parse_args()
  networks = [load_pretrained(run) for run in options.runs]
  data = run_data(options.runs[0], options.data_dir)
  source = open_dataset(data.dataset, data.eval_split, data.data_dir)
  images = [decode_pixels(one.image) for one in source.read(np.arange(options.images))]
  layers = [name for name, _ in networks[0].spec.named_layers()]
  runs = [features(one.model, one.variables, images, layers) for one in networks]
  found = {measure: similarity_between_runs(runs, measure) for measure in MEASURES}
  for layer in layers:
    shown = (
      f'{measure} {values[layer].mean:.3f} ± {values[layer].deviation:.3f}'
      for measure, values in found.items()
    )
    print(f'{layer:8} {", ".join(shown)}')
  record = {
    'variant': networks[0].spec.name,
    'runs': len(networks),
    'images': f'{options.images} of {source.name}',
    'similarity': {
      measure: {layer: list(values[layer]) for layer in layers} for measure, values in found.items()
    },
    **{key: environment()[key] for key in ('commit', 'devices', 'versions')},
  }
  write_json(RESULTS, record)


if __name__ == '__main__':
  main()
