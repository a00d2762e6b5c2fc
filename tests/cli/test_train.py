"""What people type: recipes, overrides, and the mistakes they make."""

import pathlib
import re
import subprocess
import sys

import pytest

from alexnet_flax import VARIANTS, config, save_weights
from alexnet_flax.cli import main as __main__
from alexnet_flax.cli import train
from alexnet_flax.cli.train import main, parse
from alexnet_flax.config import Config, config_dict, from_dict, with_values
from alexnet_flax.data import tfds_source
from alexnet_flax.errors import DivergedError, UsageError
from alexnet_flax.training import train as training
from alexnet_flax.training import workdir
from tests.helpers import TINY, encode, random_variables, replace, smooth_image

RECIPES = sorted(path.as_posix() for path in pathlib.Path('configs').glob('*.py'))


def parsed(*arguments):
  return parse(['train.py', *arguments])[0]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """A folder with 200 images of two classes for training, and 50 for validation."""
  folder, content = tmp_path_factory.mktemp('photos'), encode(smooth_image(40, 40, 0))
  for split, count in (('train', 200), ('validation', 50)):
    for number in range(count):
      place = folder / split / ('ant', 'bee')[number % 2]
      place.mkdir(parents=True, exist_ok=True)
      (place / f'{number}.jpg').write_bytes(content)
  return f'--config.data.data_dir={folder}'


@pytest.mark.parametrize('recipe', RECIPES)
def test_every_recipe_is_complete_and_allowed(recipe, photos):
  data = [photos] if 'folder' in recipe else []
  parsed_config = parsed(f'--config={recipe}', *data)
  assert from_dict(config_dict(parsed_config).to_dict()) == parsed_config
  other = parsed(f'--config={recipe}:torchvision', *data)
  assert other.model.variant == 'torchvision'


def test_the_recipe_for_a_folder_follows_the_number_of_images(photos):
  small = parsed('--config=configs/folder.py', photos)
  assert (small.data.batch_size, small.data.eval_split) == (16, 'validation')
  assert (small.total_steps, small.optimizer.warmup_steps) == (20_000 // 16, 62)
  assert small.optimizer.learning_rate == 0.1 / 16
  assert small.model.batch_norm_momentum == 0.99
  # What the command line says is kept, and the rest follows from it.
  given = parsed(
    '--config=configs/folder.py', photos, '--config.data.batch_size=64', '--config.model.width=1'
  )
  assert (given.data.batch_size, given.total_steps, given.model.width) == (64, 312, 1.0)
  assert given.optimizer.learning_rate == 0.1 / 4
  assert given.model.batch_norm_momentum == pytest.approx(1 - 10 / 312)
  lengths = ['--config.total_epochs=5', '--config.eval_every_epochs=2', '--config.optimizer.warmup_epochs=1']
  epochs = parsed('--config=configs/folder.py', photos, *lengths)
  assert (epochs.total_epochs, epochs.eval_every_epochs, epochs.optimizer.warmup_epochs) == (5, 2, 1)
  assert epochs.total_steps is epochs.eval_every_steps is epochs.optimizer.warmup_steps is None
  assert epochs.checkpoint_every_steps
  with pytest.raises(UsageError, match=r'data.batch_size \(=0\) must be at least 1'):
    parsed('--config=configs/folder.py', photos, '--config.data.batch_size=0')
  plain = parsed('--config=configs/folder.py:paper', photos)
  assert (plain.model.variant, plain.optimizer.learning_rate) == ('paper', 0.02 / 16)
  with pytest.raises(UsageError, match=r'data_dir \(=None\) must be a folder'):
    parsed('--config=configs/folder.py')


def test_a_transfer_takes_the_network_of_its_source(photos, tmp_path):
  changed = {'lrn': False, 'batch_norm': 'after', 'pool_size': 2, 'pool_padding': 1}
  run = replace(TINY, model={'variant': 'ungrouped', 'image_size': 67, **changed})
  (tmp_path / 'run').mkdir()
  workdir.write_records(tmp_path / 'run', run, ['x', 'y'], 0)
  spec = VARIANTS['caffenet'].scaled(1 / 8, 99)
  save_weights(tmp_path / 'a.safetensors', spec, random_variables(spec, 3))
  for recipe in ('--config=configs/folder.py', '--config=configs/finetune.py'):
    config = parsed(recipe, photos, f'--config.transfer.source={tmp_path / "run"}')
    assert (config.model.variant, config.model.width, config.model.image_size) == ('ungrouped', 1 / 16, 67)
    assert config.transfer.layer == 'pool2'
    assert {key: getattr(config.model, key) for key in changed} == changed
    config = parsed(recipe, photos, f'--config.transfer.source={tmp_path / "a.safetensors"}')
    assert (config.model.variant, config.model.width, config.model.image_size) == ('caffenet', 1 / 8, 99)
    config = parsed(recipe, photos, f'--config.transfer.source={tmp_path / "run"}', '--config.model.width=2')
    assert config.model.width == 2.0


def test_what_the_recipes_cite():
  default, paper = parsed('--config=configs/imagenet.py'), parsed('--config=configs/imagenet_2012.py')
  assert (default.model.variant, default.data.dataset, default.data.batch_size) == (
    'batchnorm', 'imagenet2012', 256
  )  # fmt: skip
  assert (paper.model.variant, paper.data.batch_size, paper.optimizer.learning_rate) == ('paper', 128, 0.01)
  assert (paper.optimizer.momentum, paper.optimizer.weight_decay) == (0.9, 5e-4)


def test_overrides():
  changed = parsed(
    '--config=configs/digits.py',
    '--config.data.batch_size=64',
    '--config.optimizer.learning_rate=1',
    '--config.data.crop_scale=(0.5, 1)',
    '--config.optimizer.schedule=step',
    '--config.optimizer.boundary_epochs=(3,)',
    '--config.total_steps=7',
    '--config.data.data_dir=/somewhere',
    '--config.optimizer.nesterov=true',
    '--config.model.dropout_rate=0.25',
  )
  assert changed.data.batch_size == 64
  assert changed.optimizer.learning_rate == 1.0
  assert changed.data.train_view.crop_scale == (0.5, 1.0)
  assert changed.optimizer.boundary_epochs == (3.0,)
  assert changed.total_steps == 7
  assert changed.data.data_dir == '/somewhere'
  assert changed.optimizer.nesterov is True
  assert changed.model.dropout_rate == 0.25


def test_keys_of_layers_that_the_variant_lacks(capsys, tmp_path):
  """Of a recipe they are left out, for it is made for its own variant; who sets one is told."""
  for flags in (':torchvision',), ('', '--config.model.variant=paper'):
    assert parsed(f'--config=configs/digits.py{flags[0]}', *flags[1:]).model.batch_norm_momentum is None
    assert 'note: model.batch_norm_momentum (=0.9) does nothing' in capsys.readouterr().err
  for key, variant, kind in (
    ('batch_norm_momentum=0.5', 'caffe', 'BatchNorm'),
    ('dropout_rate=0.5', 'cifar10_full', 'Dropout'),
    ('lrn=false', 'torchvision', 'LocalResponseNorm'),
  ):
    with pytest.raises(UsageError, match=f'does nothing: {variant} has no {kind}; leave it out'):
      parsed(f'--config=configs/digits.py:{variant}', f'--config.model.{key}')
  wrong = with_values(Config(), {'model.variant': 'cifar10_full', 'model.dropout_rate': 0.1})
  with pytest.raises(UsageError, match='cifar10_full has no Dropout; leave it as'):
    training.train(wrong, tmp_path)


@pytest.mark.parametrize(
  ('flag', 'other'),
  [
    ('optimizer.boundary_epochs=(3,)', 'optimizer.schedule=cosine'),
    ('optimizer.decay_power=2.0', 'optimizer.schedule=cosine'),
    ('optimizer.end_learning_rate=0.1', 'optimizer.schedule=constant'),
    ('data.crop_scale=(0.5, 1.0)', 'data.crop=random_crop'),
  ],
)
def test_keys_that_another_key_makes_idle(flag, other):
  with pytest.raises(UsageError, match=re.escape(f'does nothing with {other}; leave it out')):
    parsed('--config=configs/digits.py', f'--config.{flag}', f'--config.{other}')


def test_what_a_recipe_sets_for_its_own_schedule(capsys):
  changed = parsed('--config=configs/imagenet_2012.py', '--config.optimizer.schedule=cosine')
  assert changed.optimizer.boundary_epochs == ()
  assert 'boundary_epochs' in capsys.readouterr().err


def test_every_key_can_be_overridden():
  for key in config.all_keys():
    value = config.value_of(Config(), key)
    text = {bool: 'true', str: 'x', tuple: '(0.5, 0.5)'}.get(type(value), '1')
    if value is None:
      text = {bool: 'true', str: 'x'}.get(config.all_keys()[key].types[0], '1')
    values = train.flags_of(['train.py', '--config=configs/digits.py', f'--config.{key}={text}'])
    arrived = values.config
    for part in key.split('.'):
      arrived = arrived[part]
    assert str(arrived).lower() in (text, f'{text}.0')


def test_the_folder_is_named_for_the_recipe():
  assert parse(['train.py', '--config=configs/digits.py'])[1] == 'runs/digits'
  assert parse(['train.py', '--config=configs/digits.py:paper', '--workdir=x'])[1] == 'x'


MISTAKES = [
  ((), 'usage: python train.py --config=FILE'),
  (
    ('--config=configs/imagnet.py',),
    "no configuration file 'configs/imagnet.py'; did you mean 'configs/imagenet.py'",
  ),
  (('--confg=configs/digits.py',), "unknown flag '--confg'; did you mean '--config'"),
  (
    ('--config=configs/digits.py', '--epochs=3'),
    "unknown flag '--epochs'; did you mean '--config.total_epochs'",
  ),
  (('--config=configs/digits.py', '--lr=3'), "did you mean '--config.optimizer.learning_rate'"),
  (('--config=configs/digits.py', '--batch_size=3'), "did you mean '--config.data.batch_size'"),
  (('--config=configs/digits.py', '--config.epochs=3'), "'epochs'; did you mean 'total_epochs'"),
  (('--config=configs/digits.py', '--workdri=x'), "unknown flag '--workdri'; did you mean '--workdir'"),
  (
    ('--config=configs/digits.py', '--config.data.batchsize=3'),
    "'data.batchsize'; did you mean 'data.batch_size'",
  ),
  (('--config=configs/digits.py', '--config.batch_size=3'), "'batch_size'; did you mean 'data.batch_size'"),
  (('--config=configs/digits.py', '--config.data.batch_size=many'), 'data.batch_size'),
  (('--config=configs/digits.py', '--config.data.batch_size=2.5'), 'data.batch_size'),
  (
    ('--config=configs/digits.py', '--config.data.batch_size=0'),
    r'data.batch_size \(=0\) must be at least 1',
  ),
  (('--config=configs/digits.py', '--config.data.crop_scale=(0.5,)'), 'data.crop_scale'),
  (('--config=configs/digits.py', '--config.data.crop_scale=(0.5, 2)'), r'data.crop_scale \(=\(0.5, 2.0\)\)'),
  (('--config=configs/digits.py', '--config.data.flip=perhaps'), 'data.flip'),
  (('--config=configs/digits.py:torchvison',), "'torchvison'; did you mean 'torchvision'"),
  (('--config=configs/digits.py', '--config.model.variant=alexnet'), 'model.variant: .alexnet'),
  (('--config=configs/digits.py', '--config.model.activation=rellu'), "'rellu'; did you mean 'relu'"),
  (('--config=configs/digits.py', '--config.model.pooling=mean'), "'mean'.*choices: max, avg"),
  (('--config=configs/digits.py', '--config.model.dtype=float16'), "'float16'.*float32, bfloat16"),
  (('--config=configs/digits.py', '--config.optimizer.schedule=cosin'), "did you mean 'cosine'"),
  (('--config=configs/digits.py', '--config.optimizer.schedule=step'), 'needs boundary_epochs'),
  (('--config=configs/digits.py', '--config.loss.name=mse'), "'mse'.*mean_squared_error"),
  (('--config=configs/digits.py', '--config.model.image_size=30'), 'too small.*at least 57x57'),
  (('--config=configs/digits.py', '--config.model.width=-1'), r'model.width \(=-1.0\) must be more than 0'),
  (('--config=configs/digits.py', '--config.optimizer.momentum=1.0'), 'must be less than 1'),
  (('--config=configs/digits.py', '--config.optimizer.learning_rate=nan'), 'optimizer.learning_rate'),
  (('--config=configs/digits.py', '--config.optimizer.accumulate_steps=3'), 'must be divisible'),
  (('--config=configs/digits.py', '--config.data.center_crop_share=2'), 'must be at most 1'),
  (('--config=configs/digits.py', '--config.model.width=inf'), 'must be finite'),
  (('--config=configs/digits.py', '--config.total_epochs=inf'), 'must be finite'),
  (('--config=configs/digits.py', '--config.seed=99999999999'), 'must be at most'),
  (('--config=configs/digits.py', '--config.optimizer.boundary_epochs=(9, 3)'), 'ascending'),
  (('--config=',), 'no --config=FILE is given; there are: configs'),
  (('--config.data.batch_size=3',), 'no --config=FILE is given'),
  (('--flagfile=/nowhere',), 'nowhere'),
  (('--config=configs/digits.py', 'digits'), "unexpected argument 'digits'"),
]


@pytest.mark.parametrize(('arguments', 'message'), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message):

  def run(config, workdir):
    raise AssertionError('the run began')

  assert main(['train.py', *arguments], run) == 2
  out, error = capsys.readouterr()
  assert out == ''
  assert re.search(message, error), error
  if arguments:
    assert error.count('\n') == 1
    assert 'Traceback' not in error


def test_a_recipe_with_a_mistake_of_its_own(tmp_path, capsys):
  recipe = tmp_path / 'mine.py'
  head = 'from alexnet_flax.config import Config, config_dict\ndef get_config(arg=None):\n'
  cases = [
    ('  pass\n', 'get_config returned None'),
    ('  c = config_dict(Config())\n  c.data.batchsize = 3\n  return c\n', "did you mean 'data.batch_size'"),
    ('  return {"data": {"batch_size": "many"}}\n', "data.batch_size (='many') must be of type int"),
    ('  return nothing\n', "NameError: name 'nothing' is not defined"),
    ('  return (\n', "SyntaxError: '(' was never closed"),
  ]
  for body, message in cases:
    recipe.write_text(head + body)
    assert main(['train.py', f'--config={recipe}']) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


def test_divergence_is_exit_code_3(capsys):
  def run(config, workdir):
    raise DivergedError('the loss is nan')

  assert main(['train.py', '--config=configs/digits.py'], run) == 3
  assert capsys.readouterr().err == 'error: the loss is nan\n'


@pytest.mark.parametrize(
  'values', [{'modle': {}}, {'model': 3}, {'seed': 'x'}, {'seed': True}, {'seed': None}]
)
def test_mappings_are_read_strictly(values):
  with pytest.raises(UsageError):
    from_dict(values)


def test_prepare(monkeypatch, capsys):
  calls = []
  monkeypatch.setattr(tfds_source, 'prepare', lambda *arguments: calls.append(arguments))
  assert __main__.main(['prepare', 'cifar10', '--data_dir=a', '--manual_dir=b']) == 0
  assert calls == [('cifar10', 'a', 'b')]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'VERB'),
    (['prepar', 'cifar10'], "unknown verb 'prepar'; did you mean 'prepare'?"),
    (['train', '--config=configs/digits.py'], 'training is: python train.py --config=configs/digits.py'),
    (['prepare'], 'NAME'),
    (
      ['prepare', 'cifar10', '--datadir=x'],
      '--datadir=x; did you mean --data_dir? see alexnet-flax prepare --help',
    ),
    (['predict', 'a.png', '--batch_size=x'], '--batch_size=x; see alexnet-flax predict --help'),
    (['evaluate', '--batch_size=x'], "invalid int value: 'x'; see alexnet-flax evaluate --help"),
    (['prepare', 'image_folder'], 'needs no preparation'),
  ],
)
def test_mistakes_of_the_console_script(capsys, arguments, message):
  assert __main__.main(arguments) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1


def test_prepare_of_an_unknown_data_set(capsys, tmp_path):
  assert __main__.main(['prepare', 'cifar01', f'--data_dir={tmp_path}']) == 2
  assert "did you mean 'cifar10" in capsys.readouterr().err


def test_the_console_script_and_the_module_are_the_same():
  for command in (['alexnet-flax'], [sys.executable, '-m', 'alexnet_flax']):
    if command[0] == 'alexnet-flax':
      command = [str(pathlib.Path(sys.executable).parent / 'alexnet-flax')]
    result = subprocess.run([*command, '--help'], capture_output=True, text=True, check=True)
    assert 'prepare' in result.stdout


def test_help(capsys):
  for flag in ('-h', '--help'):
    assert main(['train.py', flag]) == 0
    assert capsys.readouterr().out.startswith('usage: python train.py')


@pytest.mark.parametrize('verb', [[], *([verb] for verb in __main__.VERBS)])
def test_help_of_a_verb(verb, capsys):
  with pytest.raises(SystemExit, match='0'):
    __main__.main([*verb, '--help'])
  said = capsys.readouterr().out
  assert said.startswith(' '.join(['usage: alexnet-flax', *verb]))
  assert '%%' not in said
  assert '%(' not in said


def test_the_program_alone_says_what_to_type():
  result = subprocess.run([sys.executable, 'train.py'], capture_output=True, text=True, check=False)
  assert result.returncode == 2
  assert 'python train.py --config=configs/digits.py' in result.stderr
