"""What layers represent: dissimilarities of images, and how alike networks of different seeds are."""

import functools
import pathlib

import jax
import numpy as np
from scipy.spatial.distance import squareform
from sklearn.datasets import load_sample_images

from alexnet_flax import VARIANTS, AlexNet, features
from alexnet_flax.inference.representations import (
  bootstrap_interval,
  compare_rdms,
  dissimilarities,
  linear_cka,
  noise_ceiling,
  similarity_between_runs,
)
from alexnet_flax.viz.similarity import draw_between_runs

LAYERS = ['relu1', 'relu3', 'relu5', 'fc7']

# Twelve squares of each of scikit-learn's two photographs, uint8 RGB [106, 106, 3].
corners = [(top, left) for top in (0, 106, 212) for left in (0, 160, 320, 480)]
photographs = load_sample_images().images
stimuli = [image[top : top + 106, left : left + 106] for image in photographs for top, left in corners]

# Random weights. For trained ones: load_pretrained('runs/seeds/seed-0'), ..., with .model and .variables.
spec = VARIANTS['batchnorm'].scaled(1 / 16, image_size=67)
model = AlexNet(spec)
initialize = jax.jit(functools.partial(model.init, train=False))
blank = np.zeros((1, 67, 67, 3), np.float32)
networks = [initialize(jax.random.key(seed), blank) for seed in range(4)]

# `features` resizes, crops and normalizes as the spec says: a dict of [24, ...] by layer for each network.
runs = [features(model, variables, stimuli, LAYERS) for variables in networks]

print('mean dissimilarity, 1 - correlation, within and between the photographs:')
for layer in LAYERS:
  rdm = squareform(dissimilarities(runs[0][layer]))  # [24, 24]
  within = np.mean([squareform(rdm[:12, :12], checks=False), squareform(rdm[12:, 12:], checks=False)])
  print(f'  {layer}: {within:.3f} within, {rdm[:12, 12:].mean():.3f} between')

# RSA: each layer of the first network as a model of the last one of the others, the subjects.
subjects = np.stack([dissimilarities(run['fc7']) for run in runs[1:]])  # [3, 24 * 23 / 2]
lower, upper = noise_ceiling(subjects)
print(f'noise ceiling of fc7 in three networks: {lower:.3f} to {upper:.3f}')
for layer in LAYERS:
  rdm = dissimilarities(runs[0][layer])
  each, (low, high) = compare_rdms(rdm, subjects), bootstrap_interval(rdm, subjects[0], draws=100)
  print(
    f'  {layer}: {each.mean():.2f} on average; subject 1: {each[0]:.2f}, in 95 % {low:.2f} ... {high:.2f}'
  )

# CKA of relu3 for stimuli in 50 random orders, which have nothing in common: debiased, it is 0 on average.
rng = np.random.default_rng(0)
shuffled = [rng.permutation(runs[1]['relu3']) for _ in range(50)]
for debiased in (False, True):
  mean = np.mean([linear_cka(runs[0]['relu3'], one, debiased=debiased) for one in shuffled])
  print(f'{"debiased CKA" if debiased else "CKA"} of shuffled stimuli: {mean:.2f}')

# How alike all pairs of networks are, layer by layer: mean and standard deviation.
similarity = {measure: similarity_between_runs(runs, measure) for measure in ('rsa-spearman', 'cka-debiased')}
draw_between_runs(similarity, pathlib.Path('between_seeds.svg'))
for measure, found in similarity.items():
  values = ', '.join(f'{layer} {one.mean:.2f} ± {one.deviation:.2f}' for layer, one in found.items())
  print(f'{measure} between seeds: {values}')
