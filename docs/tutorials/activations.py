"""How similar images are to each layer: 1 - correlation of its activations."""

import functools

import jax
import numpy as np
from scipy.spatial.distance import squareform
from sklearn.datasets import load_sample_images

from alexnet_flax import VARIANTS, AlexNet, features
from alexnet_flax.inference.representations import dissimilarities

LAYERS = ['relu1', 'relu3', 'relu5', 'fc7']

china, flower = load_sample_images().images  # uint8 RGB [427, 640, 3]
images = {
  'temple': china,
  'temple, mirrored': china[:, ::-1],
  'temple, upside down': china[::-1],
  'flower': flower,
}

# Random weights. For trained ones: network = load_pretrained('torchvision'), network.model, network.variables
spec = VARIANTS['batchnorm'].scaled(1 / 16, image_size=67)
model = AlexNet(spec)
initialize = jax.jit(functools.partial(model.init, train=False))
variables = initialize(jax.random.key(0), np.zeros((1, 67, 67, 3), np.float32))

# `features` resizes, crops and normalizes as the spec says.
rows = features(model, variables, list(images.values()), LAYERS)
for layer in LAYERS:
  rdm = squareform(dissimilarities(rows[layer]))  # [4, 4]
  text = ', '.join(f'{name} {value:.2f}' for name, value in zip(images, rdm[0], strict=True))
  print(f'{layer}: {text}')
