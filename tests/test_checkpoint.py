"""Checkpoints: in folders of any name, whole or not at all, set aside where they are damaged."""

import json
import os
import threading
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_flax import checkpoint
from alexnet_flax.steps import TrainState


@pytest.fixture
def state():
  """A state of one array, which needs no compiler."""
  params, tx = {'fc': {'kernel': jnp.arange(6.0).reshape(2, 3)}}, optax.sgd(0.1, momentum=0.9)
  return TrainState(jnp.array(3, jnp.int32), params, {}, tx.init(params), None, print, tx)


def saved(folder, state):
  """A manager of a new folder with the checkpoint of step 3."""
  folder.mkdir(parents=True)
  manager = checkpoint.checkpoint_manager(folder, keep=2)
  checkpoint.save(manager, state, {'top1': 0.5})
  checkpoint.finish(manager)
  return manager


@pytest.mark.parametrize('name', ['[2026] thesis', 'a\\b', 'what?', os.fsdecode(b'a\xffb')])
def test_a_folder_of_any_name_can_be_restored(state, tmp_path, monkeypatch, name):
  (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path / name)  # an odd name counts wherever it stands
  folder = tmp_path / name / 'checkpoints'
  manager = saved(folder, state)
  assert checkpoint.steps_in(folder) == [3]
  assert checkpoint.damage(folder / '3') is None
  restored = checkpoint.restore(manager, 3, state)
  np.testing.assert_array_equal(restored.params['fc']['kernel'], state.params['fc']['kernel'])
  manager.close()
  np.testing.assert_array_equal(
    checkpoint.load_arrays(folder, 3)['params/fc/kernel'], state.params['fc']['kernel']
  )
  checkpoint.save_alone(tmp_path / name / 'failures' / '3' / 'state', state)
  assert (tmp_path / name / 'failures' / '3' / 'state' / 'manifest.ocdbt').is_file()
  assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing lies elsewhere


def test_a_checkpoint_without_its_arrays_is_not_saved(state, tmp_path, monkeypatch):
  """Orbax says that it has saved, and merges nothing in a folder whose name it takes for a pattern."""
  monkeypatch.setattr(checkpoint, '_safe', lambda folder: folder)
  with pytest.raises(checkpoint.SaveError, match=r'step 3 cannot be written: .*fc\.kernel.* does not exist'):
    saved(tmp_path / '[a]', state)
  assert list((tmp_path / '[a]').iterdir()) == []
  with pytest.raises(ValueError, match='does not exist'):
    checkpoint.save_alone(tmp_path / '[b]' / 'state', state)


def test_a_manifest_knows_what_restoring_needs(state, tmp_path):
  """Also one that was written of an incomplete checkpoint, by an earlier version of this program."""
  saved(tmp_path / 'a', state).close()
  place = tmp_path / 'a' / '3'
  (place / 'default' / 'manifest.ocdbt').unlink()
  listed = json.loads((place / checkpoint.MANIFEST).read_text())
  del listed['files']['default/manifest.ocdbt']
  (place / checkpoint.MANIFEST).write_text(json.dumps(listed))
  assert checkpoint.damage(place) == 'default/manifest.ocdbt is missing'
  with pytest.raises(checkpoint.UsageError, match='no checkpoint in'):
    checkpoint.restore_variables(tmp_path / 'a')


def test_no_temporary_folder_that_orbax_could_use(state, tmp_path, monkeypatch):
  (tmp_path / '[t]').mkdir()
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path / '[t]'))
  with pytest.raises(checkpoint.UsageError, match='use another --workdir or TMPDIR'):
    saved(tmp_path / '[w]', state)


@pytest.fixture
def mounted(mount):
  """A small file system, and a function that makes it read-only."""
  return mount('size=1m,nr_inodes=16'), lambda: mount('remount,ro')


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # TensorStore's
@pytest.mark.parametrize('read_only', [False, True])
@pytest.mark.parametrize('alone', [False, True])
def test_a_save_that_fails_leaves_no_thread(state, mounted, read_only, alone):
  """One that waits for a folder which cannot be created would keep the process for five minutes."""
  folder, make_read_only = mounted
  (folder / 'checkpoints').mkdir()
  manager = checkpoint.checkpoint_manager(folder / 'checkpoints', keep=2)
  before = set(threading.enumerate())
  if read_only:
    make_read_only()
  if alone:
    with pytest.raises((OSError, ValueError)):
      checkpoint.save_alone(folder / 'state', state)
  else:
    with pytest.raises(checkpoint.SaveError):  # at the beginning or at the end
      checkpoint.save(manager, state) or checkpoint.finish(manager)
  manager.close()
  deadline = time.monotonic() + 10
  while left := [one for one in threading.enumerate() if not one.daemon and one not in before]:
    assert time.monotonic() < deadline, left
    time.sleep(0.05)
