"""How alike images are to each layer: 1 - correlation of its activations, for two photographs."""

import jax
import numpy as np
from sklearn.datasets import load_sample_images

from alexnet_flax import VARIANTS, AlexNet, features

LAYERS = ['relu1', 'relu3', 'relu5', 'fc7']

china, flower = load_sample_images().images  # uint8 RGB [427, 640, 3]
images = {
  'temple': china,
  'temple, mirrored': china[:, ::-1],
  'temple, upside down': china[::-1],
  'flower': flower,
}

# Random weights here; for real ones: variables = load_weights('torchvision', VARIANTS['torchvision'])
spec = VARIANTS['torchvision'].scaled(1 / 8, image_size=131)
model = AlexNet(spec)
variables = model.init(jax.random.key(0), np.zeros((1, 131, 131, 3), np.float32), train=False)

rows = features(model, variables, list(images.values()), LAYERS)  # resized, cut and normalised by the spec
for layer in LAYERS:
  activations = rows[layer].reshape(len(images), -1)
  dissimilarity = 1 - np.corrcoef(activations)
  told = ', '.join(f'{name} {value:.2f}' for name, value in zip(images, dissimilarity[0], strict=True))
  print(f'{layer}: {told}')
