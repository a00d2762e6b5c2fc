"""`alexnet-flax hub`: trained networks to the Hugging Face Hub, and from it."""

import pathlib
import shutil
import tempfile
from typing import Any

from alexnet_flax.errors import UsageError, needs_extra
from alexnet_flax.export.model_card import card, last_evaluation
from alexnet_flax.files import atomic_path, check_writable, expanded, write_json, write_text
from alexnet_flax.pretrained import PretrainedModel, load_pretrained
from alexnet_flax.weights import open_weights, save_weights
from alexnet_flax.weights.hub import PREFIX, WEIGHTS, download, hub_errors, repository_of

CONFIG, CARD = 'config.json', 'README.md'


def push(source: str, name: str, *, private: bool = False, **network: Any) -> None:
  """Writes a network's weights, configuration and model card to a repository, and prints its address.

  Args:
    source: A trained network, as for `load_pretrained`.
    name: The repository, OWNER/NAME; it is made if there is none. Files of the same names are replaced.
    private: Whether a new repository is seen by its owner alone.
    network: Further arguments of `load_pretrained`.

  Raises:
    UsageError: The name or the source is wrong, there is no token, or the Hub does not take it.
  """
  repository, revision = repository_of(name)
  if revision is not None:
    raise UsageError(f'{name}: a network is pushed to the main branch; leave out @{revision}')
  with needs_extra('alexnet-flax hub'):
    import huggingface_hub
  if huggingface_hub.get_token() is None:
    raise UsageError('the Hub needs a token that may write: hf auth login, or the environment HF_TOKEN=...')
  loaded = load_pretrained(source, **network)
  said = f'{loaded.spec.name}, {loaded.num_parameters:,} parameters'
  with tempfile.TemporaryDirectory() as folder:
    _write(pathlib.Path(folder), repository, loaded)
    with hub_errors(name):
      address = huggingface_hub.create_repo(repository, private=private or None, exist_ok=True)
      huggingface_hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=said)
  print(f'{loaded.source}: {said}\nwrote {address}; load_pretrained({PREFIX + repository!r}) reads it')


def _write(folder: pathlib.Path, repository: str, network: PretrainedModel) -> None:
  from huggingface_hub import EvalResult, ModelCardData

  spec, names = network.spec, network.class_names
  (weights,) = save_weights(folder / WEIGHTS, spec, network.variables, class_names=names)
  labels = {str(number): name for number, name in enumerate(names)}
  about = {'model_type': 'alexnet', 'library_name': 'alexnet_flax', 'variant': spec.name}
  write_json(folder / CONFIG, {**about, 'image_size': spec.image_size, 'num_channels': 3, 'id2label': labels})
  task, results = 'image-classification', []
  data, lines = last_evaluation(network)
  if data:
    on: dict[str, Any] = {
      'dataset_type': data.dataset,
      'dataset_name': data.dataset,
      'dataset_split': data.eval_split,
    }
    on |= {'task_type': task, 'metric_type': 'accuracy'}
    results = [EvalResult(metric_name=x['name'], metric_value=x['value'], **on) for x in lines]
  listed: dict[str, Any] = {'model_name': repository, 'eval_results': results} if results else {}
  metadata = ModelCardData(
    library_name='alexnet_flax', pipeline_tag=task, tags=['alexnet', 'flax', 'jax'], **listed
  )
  usage = f"""
```python
from alexnet_flax import load_pretrained  # pip install 'alexnet_flax[hub,train]'

network = load_pretrained('{PREFIX}{repository}')
```

The same name serves every command: `alexnet-flax predict photos --weights {PREFIX}{repository}`
"""
  write_text(folder / CARD, f'---\n{metadata.to_yaml()}\n---\n{card(repository, [weights], network)}{usage}')


def pull(name: str, out: str | None = None) -> None:
  """Copies a repository's weights, configuration and model card into a folder, and prints what they are.

  Args:
    name: The repository, OWNER/NAME[@REVISION].
    out: The folder, made if there is none; if None, NAME.

  Raises:
    UsageError: There is no such repository, it holds no weights that can be read, or the folder cannot be
      written.
  """
  folder = expanded(out or repository_of(name)[0].rpartition('/')[2])
  try:
    for path in [folder / file for file in (WEIGHTS, CONFIG, CARD)] if folder.is_dir() else [folder]:
      check_writable(path)
    downloaded = download(name, (WEIGHTS, CONFIG, CARD))
    spec = open_weights(downloaded / WEIGHTS).find_spec()
    folder.mkdir(exist_ok=True)
    for file in (WEIGHTS, CONFIG, CARD):
      if (downloaded / file).is_file():
        with atomic_path(folder / file) as place:
          shutil.copyfile(downloaded / file, place)
  except OSError as error:
    raise UsageError(f'cannot write {folder}: {error.strerror or error}') from None
  print(f'{name}: {spec.name if spec else "an unknown network; name its variant"}\nwrote {folder / WEIGHTS}')
