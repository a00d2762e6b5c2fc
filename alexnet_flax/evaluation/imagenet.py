"""ImageNet's validation set and its variants, by TFDS name: number of images, classes, published errors."""

from typing import NamedTuple

import numpy as np


class KnownSet(NamedTuple):
  """The images and classes over which published results are measured."""

  split: str
  images: int
  restricted: bool = False  # whether predictions are restricted to the classes that occur in it
  is_cropped: bool = False  # whether its images are 224x224 already, so that none is resized or cropped again


# Sources: Russakovsky et al. 2015; Recht et al. 2019 (V2); Hendrycks et al. 2021, section 3 (A: 200 classes);
# Hendrycks et al. 2021, "The many faces of robustness" (R: 200 classes); Wang et al. 2019 (Sketch); Beyer et
# al. 2020 (ReaL); Hendrycks and Dietterich 2019 (C).
KNOWN = {
  'imagenet2012': KnownSet('validation', 50_000),
  'imagenet_v2': KnownSet('test', 10_000),
  'imagenet_a': KnownSet('test', 7_500, restricted=True),
  'imagenet_r': KnownSet('test', 30_000, restricted=True),
  'imagenet_sketch': KnownSet('test', 50_889),
  'imagenet2012_real': KnownSet('validation', 50_000),
  'imagenet2012_corrupted': KnownSet('validation', 50_000, is_cropped=True),
}

CORRUPTED = 'imagenet2012_corrupted'
SEVERITIES = (1, 2, 3, 4, 5)
# AlexNet's top-1 errors in %, averaged over the five severities (google-research/augmix, imagenet.py).
ALEXNET_ERRORS = {
  'gaussian_noise': 88.6428,
  'shot_noise': 89.4468,
  'impulse_noise': 92.2640,
  'defocus_blur': 81.9880,
  'glass_blur': 82.6268,
  'motion_blur': 78.5948,
  'zoom_blur': 79.8360,
  'snow': 86.6816,
  'frost': 82.6572,
  'fog': 81.9324,
  'brightness': 56.4592,
  'contrast': 85.3204,
  'elastic_transform': 64.6056,
  'pixelate': 71.7840,
  'jpeg_compression': 60.6500,
}


def known_set(dataset: str) -> KnownSet | None:
  """Returns the published set of a TFDS name, ignoring configuration and version; None if there is none.

  >>> known_set('imagenet_v2/matched-frequency:3.0.0').images
  10000
  """
  return KNOWN.get(dataset.partition('/')[0].partition(':')[0])


def corruption_errors(errors: dict[str, list[float]]) -> dict[str, float]:
  """Computes ImageNet-C's two summary metrics (Hendrycks and Dietterich 2019, section 4.2), as fractions.

  Args:
    errors: The top-1 errors of each corruption, one per severity, as fractions.

  Returns:
    'error', the mean over corruptions and severities; 'mCE', the mean of each corruption's error divided by
    AlexNet's published error.

  >>> same = {name: [error / 100] * 5 for name, error in ALEXNET_ERRORS.items()}
  >>> {name: round(value, 4) for name, value in corruption_errors(same).items()}
  {'error': 0.789, 'mCE': 1.0}
  """
  means = {name: float(np.mean(values)) for name, values in errors.items()}
  normalized = [mean / (ALEXNET_ERRORS[name] / 100) for name, mean in means.items()]
  return {'error': float(np.mean(list(means.values()))), 'mCE': float(np.mean(normalized))}
