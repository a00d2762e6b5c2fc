"""Files that PyTorch itself writes in the layouts in which weights of AlexNets are published."""

import numpy as np
import pytest
from PIL import Image

from alexnet_flax.data.images import evaluation_view
from alexnet_flax.pretrained import load_pretrained

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
torchvision = pytest.importorskip('torchvision', reason='torchvision is not installed')

LAYOUTS = {
  # CSAILVision/places365: PyTorch 0.2's format, `features` in DataParallel.
  'alexnet_places365.pth.tar': (365, True, 'airfield'),
  # rgeirhos/texture-vs-shape, by the same training program; the published file's name ends in its digest.
  'alexnet_train_60_epochs_lr0.001.pth.tar': (1000, True, 'n01440764'),
  # Ecoset's, as thingsvision reads it: torchvision's state dictionary.
  'Alexnet_ecoset.pth': (565, False, 'class 0'),
}


def test_logits(photographs, tmp_path, agree):
  transforms, photograph, errors = torchvision.transforms, photographs[0], {}
  normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  view = transforms.Compose(
    [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalize]
  )
  for name, (classes, is_wrapped, first) in LAYOUTS.items():
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet(num_classes=classes).eval()
    with torch.inference_mode():
      expected = theirs(view(Image.fromarray(photograph))[None])[0].numpy()
    saved = theirs.state_dict()
    if is_wrapped:
      theirs.features = torch.nn.DataParallel(theirs.features)
      saved = {'epoch': 90, 'arch': 'alexnet', 'state_dict': theirs.state_dict(), 'best_prec1': 50.0}
    torch.save(saved, tmp_path / name, _use_new_zipfile_serialization=not is_wrapped)
    network = load_pretrained(tmp_path / name)
    logits = network.logits(evaluation_view(photograph, network.spec)[None])[0]
    assert network.class_names[0] == first
    errors[name] = float(np.abs(logits - expected).max() / np.abs(expected).max())
    (tmp_path / name).unlink()
  what = 'logits of Places365, Stylized-ImageNet and Ecoset in the layouts of their files, random weights'
  agree(f'torchvision {torchvision.__version__}, PyTorch {torch.__version__}', what, errors)
