"""The first epochs of CIFAR-10's AlexNet, trained by PyTorch and by this package: are the curves the same?

  python benchmarks/cifar10_alexnet.py --torch-python PATH [--data_dir DIR] [--epochs 5] [--seeds 3]

The recipe is bearpaw/pytorch-classification's. PyTorch may be in another environment; both read the same
images. Writes results/cifar10_alexnet_pytorch.json, of which docs/results.md makes its table and figure, and
goes on where it was cut off.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

RESULTS = pathlib.Path('results/cifar10_alexnet_pytorch.json')
WORKDIR = pathlib.Path('runs/cifar10_alexnet_pytorch')
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
BATCH, EPOCHS = 128, 5


def train_in_pytorch(images: str, seed: int, epochs: int) -> list[list[float]]:
  """Returns [epoch, training error, test error] after each epoch; `images` is the file of `save_images`."""
  import numpy as np
  import torch
  from torch import nn

  torch.manual_seed(seed)
  with np.load(images) as found:
    data = {name: torch.from_numpy(found[name]) for name in found}
  pool = nn.MaxPool2d(2, 2)
  net = nn.Sequential(
    *(nn.Conv2d(3, 64, 11, stride=4, padding=5), nn.ReLU(), pool),
    *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool),
    *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
    *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
    *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), pool),
    *(nn.Flatten(), nn.Linear(256, 10)),
  ).to(memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
  mean, deviation = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, DEVIATION))

  def normalized(batch: torch.Tensor) -> torch.Tensor:
    floats = batch.permute(0, 3, 1, 2).float() / 255
    return ((floats - mean) / deviation).contiguous(memory_format=torch.channels_last)

  def views(batch: torch.Tensor) -> torch.Tensor:
    """RandomCrop(32, padding=4) and RandomHorizontalFlip of each image."""
    padded = nn.functional.pad(batch, (0, 0, 4, 4, 4, 4))
    tops, lefts = torch.randint(9, (2, len(batch))).tolist()
    crops = [image[y : y + 32, x : x + 32] for image, y, x in zip(padded, tops, lefts, strict=True)]
    mirrored = torch.rand(len(batch)) < 0.5
    stacked = torch.stack(crops)
    return torch.where(mirrored[:, None, None, None], stacked.flip(2), stacked)

  curve = []
  for epoch in range(1, epochs + 1):
    wrong = 0
    order = torch.randperm(len(data['train_images']))
    for chosen in order.split(BATCH):
      labels = data['train_labels'][chosen]
      logits = net(normalized(views(data['train_images'][chosen])))
      optimizer.zero_grad()
      nn.functional.cross_entropy(logits, labels).backward()
      optimizer.step()
      wrong += int((logits.argmax(1) != labels).sum())
    with torch.no_grad():
      parts = zip(data['test_images'].split(1000), data['test_labels'].split(1000), strict=True)
      missed = sum(int((net(normalized(x)).argmax(1) != y).sum()) for x, y in parts)
    curve.append([epoch, wrong / len(order), missed / len(data['test_labels'])])
    print(json.dumps(curve[-1]), file=sys.stderr, flush=True)
  return curve


def save_images(data_dir: str | None, path: pathlib.Path) -> None:
  """Writes CIFAR-10's images, uint8 [N, 32, 32, 3], and labels, int64 [N], as an .npz file."""
  import numpy as np

  from alexnet_flax.data.image_header import decode_pixels
  from alexnet_flax.data.source import read_labels
  from alexnet_flax.data.tfds_source import open_dataset

  arrays = {}
  for split in ('train', 'test'):
    source = open_dataset('cifar10', split, data_dir)
    examples = source.read(np.arange(source.num_examples))
    arrays[f'{split}_images'] = np.stack([decode_pixels(one.image) for one in examples])
    arrays[f'{split}_labels'] = read_labels(source)
  np.savez(path, **arrays)


def records(options: argparse.Namespace) -> list[dict]:
  """Trains what is missing in RESULTS, and returns the records of all runs."""
  from alexnet_flax.reproduction.claims import CLAIMS
  from alexnet_flax.reproduction.reproduce import add_records, read_records, reproduce

  claim = CLAIMS['cifar10_alexnet']
  others = {'data.data_dir': options.data_dir, 'total_epochs': float(options.epochs)}
  ours = reproduce(claim, WORKDIR, None, seeds=options.seeds, others=others)
  ours = [one | {'arm': 'alexnet_flax'} for one in ours]
  theirs = {one['seed']: one for one in read_records(RESULTS) if one['arm'] == 'PyTorch'}
  with tempfile.TemporaryDirectory() as folder:
    images = pathlib.Path(folder) / 'images.npz'
    for seed in range(options.seeds):
      if len(theirs.get(seed, {'curve': []})['curve']) >= options.epochs:
        continue
      if not images.exists():
        save_images(options.data_dir, images)
      command = [options.torch_python, __file__, '--one', str(images), str(seed), str(options.epochs)]
      found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
      theirs[seed] = ours[0] | {'arm': 'PyTorch', 'seed': seed} | found
      add_records(RESULTS, claim.name, [*ours, theirs[seed]])
  return read_records(RESULTS)


def main() -> None:
  if sys.argv[1:2] == ['--one']:
    import platform
    import time

    import torch

    start, curve = time.monotonic(), train_in_pytorch(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    hours = round((time.monotonic() - start) / 3600, 3)
    versions = {'python': platform.python_version(), 'torch': torch.__version__}
    print(json.dumps({'curve': curve, 'hours': hours, 'versions': versions}))
    return
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--torch-python', default=sys.executable)
  parser.add_argument('--data_dir')
  parser.add_argument('--epochs', type=int, default=EPOCHS)
  parser.add_argument('--seeds', type=int, default=3)
  for one in records(parser.parse_args()):
    errors = ', '.join(f'{test:.2%}' for _, _, test in one['curve'])
    print(f'{one["arm"]:12} seed {one["seed"]}: test error {errors}')


if __name__ == '__main__':
  main()
