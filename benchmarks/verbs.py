"""Seconds of the commands that look at images: sixteen images, torchvision's network.

  python benchmarks/verbs.py [--only explain,units]

The network has its full size and initial weights, and the images are noise at 256x256; the time depends on
neither. Each command starts twice, with an empty cache folder, where it compiles, and with what that left
there; the seconds are those from its start to its end. The last line is one JSON object.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image

from alexnet_flax import VARIANTS, AlexNet
from alexnet_flax.evaluation.shape_bias import CATEGORIES
from alexnet_flax.weights import save_weights
from alexnet_flax.weights.pth import dump_state_dict

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_DATA = '--dataset image_folder --data_dir images'
VERBS = {
  'predict': 'predict photos net.safetensors --saliency maps',
  'explain': 'explain photos net.safetensors --out explained.png',
  'features': 'features photos net.safetensors --layers relu1,relu5,fc7 --out a.h5',
  'compare': 'compare a.h5 a.h5',
  'units': 'units net.safetensors --layer conv5 --units 0-15 --images photos --out units.html',
  'distance': 'distance photos photos net.safetensors --heads heads.pth',
  'shape-bias': 'shape-bias cue-conflict net.safetensors',
  'evaluate': f'evaluate net16.safetensors {_DATA}',
  'fgsm': f'evaluate net16.safetensors {_DATA} --attack fgsm',
  'pgd': f'evaluate net16.safetensors {_DATA} --attack pgd',
}


def make_inputs(folder: pathlib.Path) -> None:
  """Writes the network, LPIPS's heads, and sixteen images in each of the layouts."""
  spec, rng = VARIANTS['torchvision'], np.random.default_rng(0)
  for name, count in (('net', 1000), ('net16', len(CATEGORIES))):
    network, inputs = AlexNet(spec, num_classes=count), np.zeros((1, 224, 224, 3))
    save_weights(folder / f'{name}.safetensors', spec, network.init(jax.random.key(0), inputs, train=False))
  channels = 64, 192, 384, 256, 256
  heads = {
    f'lin{i}.model.1.weight': np.ones((1, count, 1, 1), np.float32) for i, count in enumerate(channels)
  }
  (folder / 'heads.pth').write_bytes(dump_state_dict(heads))
  for number, shape in enumerate(CATEGORIES):
    image = Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8))
    name = f'{shape}1-{list(CATEGORIES)[number - 1]}1.png'
    for place in (folder / 'photos', folder / 'cue-conflict' / shape, folder / 'images' / 'test' / shape):
      place.mkdir(parents=True, exist_ok=True)
      image.save(place / name)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--only', default=','.join(VERBS), help=f'some of {",".join(VERBS)}')
  chosen = parser.parse_args().only.split(',')
  found = {}
  with tempfile.TemporaryDirectory() as place:
    make_inputs(pathlib.Path(place))
    environment = os.environ | {'PYTHONPATH': str(_ROOT), 'ALEXNET_FLAX_CACHE': f'{place}/cache'}
    for name, words in VERBS.items():
      if name not in chosen:
        continue
      seconds = []
      for _ in range(2):
        begin = time.perf_counter()
        command = [sys.executable, '-m', 'alexnet_flax', *words.split()]
        subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds.append(round(time.perf_counter() - begin, 1))
      found[name] = seconds
      print(f'{name:18} {seconds[0]:6.1f} s, then {seconds[1]:6.1f} s', flush=True)
  print(json.dumps(found))


if __name__ == '__main__':
  main()
