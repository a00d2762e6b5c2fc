"""The paper's network without its norms, with tanh, and a variant of one's own: what each has and gives."""

import dataclasses

import jax
import jax.numpy as jnp

from alexnet_flax import VARIANTS, AlexNet
from alexnet_flax.models.spec import Activation, LocalResponseNorm, Pool

paper = VARIANTS['paper'].scaled(1 / 16, image_size=67)
without_norms = tuple(layer for layer in paper.layers if not isinstance(layer, LocalResponseNorm))
specs = {
  'the paper': paper,
  'tanh for ReLU (figure 1)': paper.replace(Activation, kind='tanh'),
  'pooling without overlap (3.4)': paper.replace(Pool, kernel_size=2),
  'no normalisation (3.3)': dataclasses.replace(paper, name='no norms', layers=without_norms),
}

images = jax.random.normal(jax.random.key(1), (4, 67, 67, 3))
for name, spec in specs.items():
  model = AlexNet(spec, num_classes=10)
  variables = model.init(jax.random.key(0), images, train=False)
  logits, taps = model.apply(variables, images, train=False, endpoints=True)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  print(
    f'{name}: {parameters:,} parameters; pool5 {taps["pool5"].shape[1:]}; logits of {jnp.std(logits):.2g}'
  )
