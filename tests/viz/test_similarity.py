"""Figures of similarities: they hold the names and the values, and the same call draws the same file."""

import numpy as np
import pytest

from alexnet_flax.errors import UsageError
from alexnet_flax.inference.compare import compare_files
from alexnet_flax.inference.representations import BetweenRuns, similarity_between_runs
from alexnet_flax.viz.similarity import draw_between_runs, draw_comparisons


def test_comparisons(tmp_path):
  rng, layers = np.random.default_rng(0), ['$relu$1', '猫<b>', 'fc7\n']
  for name in ('a.npz', f'{"n" * 60}.npz'):
    np.savez(tmp_path / name, **{layer: rng.normal(size=(9, 20)) for layer in layers})
  paths = [str(tmp_path / name) for name in ('a.npz', 'a.npz', f'{"n" * 60}.npz')]
  result = compare_files(paths, 'cka', say=print)
  for number in range(2):
    draw_comparisons(result, tmp_path / f'{number}.svg')
  text = (tmp_path / '0.svg').read_text(encoding='utf-8')
  assert text == (tmp_path / '1.svg').read_text(encoding='utf-8')
  for shown in ('$relu$1', '猫&lt;b&gt;', r'fc7\n', 'cka, 9 stimuli', f'{"n" * 37}...', '>1.00<'):
    assert shown in text
  assert f'>{result.comparisons[1].similarity[0, 1]:.2f}<' in text
  with pytest.raises(UsageError, match='it is a folder'):
    draw_comparisons(result, tmp_path)


def test_between_runs(tmp_path):
  rng = np.random.default_rng(0)
  runs = [{'relu1': rng.normal(size=(9, 20)), 'fc7': rng.normal(size=(9, 20))} for _ in range(3)]
  found = {measure: similarity_between_runs(runs, measure) for measure in ('rsa-spearman', 'cka')}
  found['one pair'] = {'fc7': BetweenRuns(0.5, float('nan'), 1)}
  draw_between_runs(found, tmp_path / 'runs.svg')
  text = (tmp_path / 'runs.svg').read_text(encoding='utf-8')
  for shown in ('relu1', 'fc7', 'rsa-spearman', 'cka', 'one pair', 'similarity between runs'):
    assert f'>{shown}<' in text
