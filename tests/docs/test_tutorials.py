"""The tutorials in the documentation run, and print what it states."""

import pathlib
import re
import runpy

import pytest

TUTORIALS = pathlib.Path('docs/tutorials')
# Output that each must print, and that only a correct run prints.
EXPECTED = {
  'ablation': r'tanh instead of ReLU.*pool5 \(1, 1, 16\)',
  'attributions': r'integrated_gradients: [5-9]\d% of the attribution lies in the square',
  'calibration': r'before: .* error 0\.(0[6-9]|1)\d.*\nafter: .* error 0\.0[0-4]\d',
  'first_network': r'297 held-out images: loss .*, top1 [5-9]\d\.\d%',
  'new_loss': r'focal loss: (1\.\d{4} ?){5}',
  'representations': r'fc7: 0\.\d\d on average.*\nCKA .*: 0\.[12]\d\ndebiased CKA .*: -?0\.0\d',
  'robustness': r'no attack: top1 [5-9]\d\.\d%, LPIPS to the original 0\.0000\n.*\nPGD: top1 [0-4]?\d\.\d%',
  'seeds': r'4 seeds: loss 2\.\d{4} ± 0\.\d{4}',
  'shape_bias': r'own textures: shape bias \d% (.*\n)+any texture: shape bias [89]\d%',
  'transfer': r'new: fc8\nloss [01]\.\d+; changed: fc6, fc7, fc8',
  'units': r'see 51 pixels, every 8, the first from -18\nunit 0: [2-9]\.\d\d by .*, 1\.\d\d by temple',
}


@pytest.mark.usefixtures('standard_promotion')
@pytest.mark.parametrize('path', sorted(TUTORIALS.glob('*.py')), ids=lambda path: path.stem)
def test_tutorial(path, tmp_path, monkeypatch, capsys):
  script = str(path.resolve())
  monkeypatch.chdir(tmp_path)  # for what it writes
  runpy.run_path(script, run_name='__main__')
  assert re.search(EXPECTED[path.stem], capsys.readouterr().out)


def test_every_tutorial_is_shown():
  pages = ''.join(path.read_text() for path in pathlib.Path('docs').glob('*.md'))
  for path in TUTORIALS.glob('*.py'):
    assert f'--8<-- "{path}"' in pages
