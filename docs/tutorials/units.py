"""What units like: their receptive fields, images made for them, and the parts of photographs they like."""

import functools

import jax
import numpy as np
from sklearn.datasets import load_sample_images

from alexnet_flax import VARIANTS, AlexNet
from alexnet_flax.inference.units import maximize, peaks, top_images
from alexnet_flax.models.receptive_field import receptive_fields
from alexnet_flax.pretrained import PretrainedModel

LAYER, UNITS = 'conv2', [0, 5]

# Random weights. For trained ones: network = load_pretrained('runs/cifar10')
spec = VARIANTS['torchvision'].scaled(1 / 16, image_size=67)
model = AlexNet(spec, num_classes=10)
initialize = jax.jit(functools.partial(model.init, train=False))
variables = initialize(jax.random.key(0), np.zeros((1, 67, 67, 3), np.float32))
network = PretrainedModel('random', model, variables, class_names=())

field = receptive_fields(spec)[LAYER]
print(f'{LAYER}: units see {field.size} pixels, every {field.stride}, the first from {field.offset}')

# Views of the network's size, by name: crops of scikit-learn's two photographs.
views = []
for name, image in zip(['temple', 'flower'], load_sample_images().images, strict=True):
  corners = ((top, left) for top in range(0, 360, 67) for left in range(0, 573, 67))
  views += [(f'{name} at {top}, {left}', image[top : top + 67, left : left + 67]) for top, left in corners]

made = maximize(network, LAYER, UNITS, objective='center', steps=32)  # uint8 [2, 67, 67, 3]
activations = peaks(model, variables, LAYER, np.array(UNITS), made)[0].diagonal()
for unit, (best, *_), value in zip(UNITS, top_images(network, LAYER, UNITS, views), activations, strict=True):
  (top, bottom), (left, right) = field.spans[best.row], field.spans[best.column]
  print(f'unit {unit}: {value:.2f} by the image made for it, {best.activation:.2f} by {best.name}', end='')
  print(f' in rows {top} to {bottom}, columns {left} to {right}')
