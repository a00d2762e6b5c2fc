"""Ablations of the paper's network: parameters, output of the last pooling, spread of the initial logits."""

import dataclasses

import jax
import jax.numpy as jnp

from alexnet_flax import VARIANTS, Activation, AlexNet, LocalResponseNorm, Pool

paper = VARIANTS['paper'].scaled(1 / 16, image_size=67)
without_norms = tuple(layer for layer in paper.layers if not isinstance(layer, LocalResponseNorm))
specs = {
  'the paper': paper,
  'tanh instead of ReLU (figure 1)': paper.replace(Activation, kind='tanh'),
  'pooling without overlap (3.4)': paper.replace(Pool, kernel_size=2),
  'no normalization (3.3)': dataclasses.replace(paper, name='no norms', layers=without_norms),
}

images = jax.random.normal(jax.random.key(1), (4, 67, 67, 3))
for name, spec in specs.items():
  model = AlexNet(spec, num_classes=10)

  @jax.jit
  def initialize(key, model=model):
    return model.init_with_output(key, images, train=False, endpoints=True)

  (logits, taps), variables = initialize(jax.random.key(0))
  parameters = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  print(f'{name}: {parameters:,} parameters; pool5 {taps["pool5"].shape[1:]}; logits {jnp.std(logits):.2g}')
