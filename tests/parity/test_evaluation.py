"""A ten-crop evaluation of a torchvision state_dict, beside the same computed by PyTorch alone."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from alexnet_flax.cli.main import main
from alexnet_flax.evaluation import evaluate, protocols
from alexnet_flax.pretrained import load_pretrained

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
torchvision = pytest.importorskip('torchvision', reason='torchvision is not installed')

CLASSES = 5


@pytest.fixture
def photos(tmp_path, request):
  """Photographs in the folders of five classes: scikit-learn's two, and real ones where they are at hand."""
  images = [Image.fromarray(image) for image in load_sample_images().images]
  images += [
    images[0].rotate(180),
    images[1].rotate(90, expand=True),
    images[0].crop((50, 20, 400, 427)),
  ]
  folder = request.config.rootpath.parent / 'shared' / 'data' / 'imagenet_samples'
  if folder.is_dir():
    images += [Image.open(path).convert('RGB') for path in sorted(folder.iterdir())[:15]]
  for number, image in enumerate(images):
    place = tmp_path / 'photos' / 'test' / f'class {number % CLASSES}'
    place.mkdir(parents=True, exist_ok=True)
    image.save(place / f'{number:03}.jpg', quality=95)
  return tmp_path / 'photos'


def test_ten_crops(photos, tmp_path, agree):
  torch.manual_seed(0)
  theirs = torchvision.models.alexnet(num_classes=CLASSES).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      if parameter.ndim > 1:  # He's deviation for PyTorch's own: answers are then not all the same
        parameter *= 6**0.5
  weights = tmp_path / 'alexnet.pth'
  torch.save(theirs.state_dict(), weights)

  transforms = torchvision.transforms
  crops = transforms.Compose(
    [
      transforms.Resize(256),
      transforms.TenCrop(224),
      transforms.Lambda(
        lambda some: torch.stack(
          [
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(transforms.ToTensor()(one))
            for one in some
          ]
        )
      ),
    ]
  )
  network = load_pretrained(weights, variant='torchvision')
  source = protocols.open_evaluated('image_folder:test', str(photos))
  protocol = protocols.protocol_of([network], 'ten-crop')
  batches = evaluate._log_probabilities([network], source, protocol, 8, 1, None)
  ours = np.exp(np.concatenate([log_probabilities for log_probabilities, _ in batches]))
  names = [example.name for example in source.read(np.arange(source.num_examples))]
  labels = [label for (label,) in evaluate.correct_classes(source)]
  expected = []
  for name in names:
    with torch.no_grad():
      (path,) = photos.rglob(name.rpartition('/')[2])
      expected.append(torch.softmax(theirs(crops(Image.open(path))), 1).mean(0).numpy())
  assert np.ptp(expected, axis=0).max() > 0.1
  errors = {name: float(np.abs(a - b).max()) for name, a, b in zip(names, ours, expected, strict=True)}
  what = 'averaged probabilities of a ten-crop evaluation, greatest |a - b| of each image'
  agree(f'torchvision {torchvision.__version__}, PyTorch {torch.__version__}', what, errors)

  command = ['evaluate', '--weights', str(weights), '--variant', 'torchvision', '--protocol', 'ten-crop']
  place = ['--dataset', 'image_folder:test', '--data_dir', str(photos), '--json', str(tmp_path / 'a.json')]
  assert main([*command, *place]) == 0
  figures = json.loads((tmp_path / 'a.json').read_text())
  assert figures['top1']['value'] == pytest.approx(np.mean(np.argmax(expected, 1) == labels))
