"""Temperature scaling beside PyTorch's L-BFGS on the same logits, as Guo et al. (2017) fit it."""

import numpy as np
import pytest

from alexnet_flax.evaluation.calibration import fit_temperature

torch = pytest.importorskip('torch', reason='PyTorch is not installed')


def test_lbfgs_finds_the_same_temperature(agree):
  rng, errors = np.random.default_rng(0), {}
  for true in (0.5, 1.0, 3.0):
    logits = rng.normal(0, 3, (2000, 100)).astype(np.float32)
    labels = (logits / true + rng.gumbel(size=logits.shape)).argmax(1)
    temperature = torch.ones(1, dtype=torch.float64, requires_grad=True)
    values, target = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    optimizer = torch.optim.LBFGS([temperature], lr=0.1, max_iter=500, tolerance_change=1e-15)

    def closure(temperature=temperature, optimizer=optimizer, values=values, target=target):
      optimizer.zero_grad()
      loss = torch.nn.functional.cross_entropy(values / temperature, target)
      loss.backward()
      return loss

    optimizer.step(closure)
    errors[f'T = {true}'] = abs(fit_temperature(logits, labels) / temperature.item() - 1)
  agree(f'PyTorch {torch.__version__}', 'temperature of 2,000 x 100 logits, fitted by L-BFGS', errors)
