"""`alexnet-flax predict`, the names of classes, and Grad-CAM."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from alexnet_flax import VARIANTS, AlexNet, grad_cam, pretrained, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.data.augment import normalize
from alexnet_flax.data.images import evaluation_view
from alexnet_flax.errors import UsageError
from alexnet_flax.inference.grad_cam import default_layer, overlay
from alexnet_flax.inference.predict import output_paths
from tests.helpers import digits_run, encode, random_variables, smooth_image

SPEC = VARIANTS['torchvision'].scaled(1 / 16, 67)


@pytest.fixture
def photos(tmp_path):
  """Two photographs, in a folder."""
  folder = tmp_path / 'photos'
  folder.mkdir()
  for name, image in zip(('china', 'flower'), load_sample_images().images, strict=True):
    Image.fromarray(image).save(folder / f'{name}.jpg')
  return folder


@pytest.fixture
def weights(tmp_path):
  names = ['cat', 'great_white_shark', 'temple', 'flower', 'sea', 'sky']
  return str(
    save_weights(tmp_path / 'net.safetensors', SPEC, random_variables(SPEC, 6), class_names=names)[0]
  )


def predicted(capsys, *arguments):
  code = main(['predict', *map(str, arguments), '--json'])
  captured = capsys.readouterr()
  return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_answers_are_the_networks(photos, weights, capsys):
  code, lines, _ = predicted(capsys, photos, '--weights', weights)
  assert code == 0
  assert [line['file'] for line in lines] == [str(photos / 'china.jpg'), str(photos / 'flower.jpg')]
  variables = random_variables(SPEC, 6)
  views = np.stack([evaluation_view(np.asarray(Image.open(line['file'])), SPEC) for line in lines])
  inputs = normalize({'image': jnp.asarray(views)}, preprocessing=SPEC.preprocessing)['image']
  expected = jax.nn.softmax(AlexNet(SPEC, 6).apply(variables, inputs, train=False))
  for line, row in zip(lines, expected, strict=True):
    assert [best['class'] for best in line['best']] == np.argsort(-row)[:5].tolist()
    for best in line['best']:
      assert best['probability'] == pytest.approx(float(row[best['class']]), abs=1e-5)
  assert 'great white shark' in {best['name'] for line in lines for best in line['best']}


COUNT_OPENS = """
import pathlib, sys
from alexnet_flax.cli.main import main

path, image, *network = sys.argv[1:]
opens, reads, read_bytes = [], [], pathlib.Path.read_bytes
sys.addaudithook(lambda event, args: event == 'open' and str(args[0]) == path and opens.append(event))
pathlib.Path.read_bytes = lambda self: (str(self) == path and reads.append(self), read_bytes(self))[1]
code = main(['predict', image, '--weights', path, *network])
print(code, len(opens), len(reads))
"""


@pytest.mark.parametrize(
  ('variant', 'name'), [('torchvision', 'a.safetensors'), ('caffe', 'a.caffemodel'), ('batchnorm', 'a.keras')]
)
def test_predict_reads_a_weights_file_once(photos, tmp_path, variant, name):
  spec, path = VARIANTS[variant].scaled(1 / 16, 67), tmp_path / name
  save_weights(path, spec, random_variables(spec, 6))
  network = ['--variant', variant, '--width', '0.0625', '--image_size', '67']
  command = [sys.executable, '-c', COUNT_OPENS, str(path), str(photos / 'china.jpg'), *network]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.splitlines()[-1] == '0 1 1'


def test_arrays_are_classified_as_files_are(photos, weights, capsys, monkeypatch):
  _, lines, _ = predicted(capsys, photos, '--weights', weights)
  network = pretrained.load_pretrained(weights)
  images = [np.asarray(Image.open(line['file'])) for line in lines]
  views = [evaluation_view(image, SPEC) for image in images]
  for line, of_image, of_view in zip(lines, network.classify(images), network.classify(views), strict=True):
    assert of_image == of_view
    assert [best['name'] for best in line['best']] == [best.name for best in of_image]
    assert line['best'][0]['probability'] == pytest.approx(of_image[0].probability, abs=1e-6)
  assert [len(best) for best in network.classify(images, top=2)] == [2, 2]
  assert network.classify([]) == []
  with pytest.raises(ValueError, match='must be uint8 RGB'):
    network.classify([views[0].astype(np.float32)])
  monkeypatch.setitem(sys.modules, 'PIL', None)
  assert len(network.classify(views)) == 2
  with pytest.raises(UsageError, match='resizing images needs PIL, which is not installed: pip install'):
    network.classify(images)


def test_a_table_for_people(photos, weights, capsys):
  assert main(['predict', str(photos / '*.jpg'), '--weights', weights]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 12
  assert lines[0] == str(photos / 'china.jpg')
  assert '%' in lines[1]


def test_a_run_knows_its_classes(data_dir, photos, capsys):
  run = digits_run(data_dir)
  capsys.readouterr()  # of training it
  _, lines, _ = predicted(capsys, photos, '--weights', run)
  assert {best['name'] for line in lines for best in line['best']} <= set('0123456789')


def test_images_that_cannot_be_read_are_named_and_the_others_answered(photos, weights, tmp_path, capsys):
  (tmp_path / 'text.jpg').write_text('no image')
  (tmp_path / 'empty.png').write_bytes(b'')
  tall = Image.new('L', (1, 300), 128)
  tall.save(tmp_path / 'tall.png')
  files = [photos / 'china.jpg', tmp_path / 'text.jpg', tmp_path / 'tall.png', tmp_path / 'empty.png']
  code, lines, error = predicted(capsys, *files, tmp_path / 'absent.jpg', '--weights', weights)
  assert code == 2
  assert [bool(line.get('error')) for line in lines] == [False, True, False, True, True]
  assert len(lines[2]['best']) == 5
  assert error.splitlines()[-1] == 'error: 3 of the images cannot be read'


def test_thin_images_do_not_take_all_memory(weights, tmp_path, capsys):
  """A few bytes that would become gigabytes when resized."""
  Image.new('L', (200_000, 1)).save(tmp_path / 'thin.png')
  assert main(['predict', str(tmp_path / 'thin.png'), '--weights', weights]) == 2
  assert '200000x1 is too thin: resized, it has 15400000x77' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['absent.jpg'], 'error: cannot read absent.jpg: No such file'),
    (['nothing/*.jpg'], 'no images match nothing/*.jpg'),
    (['{folder}'], 'no images in the folder'),
    (['{photos}', '--classes', '{names}'], 'has 2 lines; it must have one for each of 6 classes'),
    (['{photos}', '--classes', 'absent.txt'], 'cannot read the class names in absent.txt'),
    (['{photos}', '--saliency', '{names}/maps'], 'cannot write to --saliency'),
  ],
)
def test_mistakes(photos, weights, tmp_path, arguments, message, capsys):
  (tmp_path / 'names.txt').write_text('a\nb\n')
  (tmp_path / 'empty').mkdir()
  places = {'folder': tmp_path / 'empty', 'photos': photos, 'names': tmp_path / 'names.txt'}
  assert main(['predict', *[text.format(**places) for text in arguments], '--weights', weights]) == 2
  assert message in capsys.readouterr().err


def test_without_a_network_none_is_downloaded_for_images_that_are_not_there(capsys):
  assert main(['predict', 'runs/typo', 'a.jpg']) == 2
  expected = 'error: cannot read runs/typo: there is no such file, folder or network\n'
  assert capsys.readouterr().err == expected


def test_the_map_of_an_image_with_the_longest_name(tmp_path):
  files = [f'{folder}/{"ü" * 125}.png' for folder in 'ab']
  paths = output_paths(files, str(tmp_path), '-gradcam.png', '--saliency')
  for path in paths.values():
    path.touch()
  assert [path.name[-15:] for path in paths.values()] == ['üüü-gradcam.png', 'ü-2-gradcam.png']


def test_saliency_images(photos, weights, tmp_path, capsys):
  (photos / 'more').mkdir()
  Image.open(photos / 'china.jpg').rotate(180).save(photos / 'more' / 'china.jpg')
  maps = tmp_path / 'maps'
  code, lines, _ = predicted(capsys, photos, '--weights', weights, '--saliency', maps)
  assert code == 0
  assert sorted(path.name for path in maps.iterdir()) == [
    'china-2-gradcam.png',
    'china-gradcam.png',
    'flower-gradcam.png',
  ]
  assert {line['saliency'] for line in lines} == {str(path) for path in maps.iterdir()}
  for line in lines:
    drawn = np.asarray(Image.open(line['saliency']))
    assert drawn.shape == (469 + 40, 2 * 469 + 12, 3)  # seven times the network's side
    view = evaluation_view(np.asarray(Image.open(line['file'])), SPEC)
    small = np.asarray(Image.fromarray(drawn[:469, :469]).resize((67, 67), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - view).mean() < 3
    assert (drawn[469:] < 128).any()  # the class and its probability


def test_an_overlay_shows_the_image_where_the_map_is_zero():
  image, heat = smooth_image(40, 40, 0), np.zeros((4, 4), np.float32)
  np.testing.assert_array_equal(overlay(image, heat), image)
  heat[0, 0] = 1
  drawn = overlay(image, heat)
  assert np.abs(drawn[:5, :5].astype(int) - image[:5, :5]).mean() > 20
  np.testing.assert_array_equal(drawn[30:, 30:], image[30:, 30:])


@pytest.mark.parametrize(
  ('variant', 'layer'),
  [
    ('batchnorm', 'norm5'),
    ('caffe', 'relu5'),
    ('cifar10_local', 'relu4'),
    ('cifar10_small_alexnet', 'relu2'),
  ],
)
def test_grad_cams_layer(variant, layer):
  assert default_layer(VARIANTS[variant]) == layer


@pytest.mark.parametrize('variant', ['batchnorm', 'caffe', 'cifar10_full'])
def test_grad_cam_is_the_papers_formula(variant):
  """The rest of the network above the layer, differentiated by itself."""
  spec = VARIANTS[variant].scaled(1 / 16, 67) if variant != 'cifar10_full' else VARIANTS[variant]
  variables, layer = random_variables(spec, 7), default_layer(spec)
  model, size = AlexNet(spec, 7), spec.image_size
  images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
  classes = np.array([4, 0, 6])
  inputs = normalize({'image': jnp.asarray(images)}, preprocessing=spec.preprocessing)['image']
  _, taps = jax.jit(functools.partial(model.apply, train=False, endpoints=True))(variables, inputs)

  def rest(activations):
    shift = {layer: activations - taps[layer]}
    return model.apply(variables, inputs, train=False, perturbations=shift)[np.arange(3), classes].sum()

  gradient = jax.jit(jax.grad(rest))(taps[layer])
  expected = np.maximum(np.einsum('nc,nhwc->nhw', gradient.mean((1, 2)), taps[layer]), 0)
  expected /= np.maximum(expected.max((1, 2), keepdims=True), 1e-30)
  found = grad_cam(model, variables, images, classes)
  assert found.max() == 1
  np.testing.assert_allclose(found, expected, atol=2e-4)


def test_grad_cam_finds_what_speaks_for_a_class():
  """A head that answers 'red' by the amount of red: the map is where the image is red."""
  spec = VARIANTS['torchvision'].scaled(1 / 16, 131)
  variables = jax.tree.map(np.zeros_like, random_variables(spec, 2))
  for name, kernel in ((n, layer['kernel']) for n, layer in variables['params'].items()):
    if name.startswith('conv'):
      center = kernel.shape[0] // 2
      kernel[center, center, 0, 0] = 1.0 if name != 'conv1' else 3.0
    else:
      kernel[:, 0] = 1.0
  image = np.zeros((1, 131, 131, 3), np.uint8)
  image[:, :50, 80:, 0] = 255
  (heat,) = grad_cam(AlexNet(spec, 2), variables, image, np.array([0]))
  row, column = np.unravel_index(heat.argmax(), heat.shape)
  assert row < heat.shape[0] / 2
  assert column > heat.shape[1] / 2
  assert heat[-1, 0] < 0.5
  drawn = overlay(image[0], heat)
  assert drawn.shape == (131, 131, 3)
  assert drawn.dtype == np.uint8


def test_layers_without_space(weights):
  model, variables = AlexNet(SPEC, 6), random_variables(SPEC, 6)
  images = np.zeros((1, 67, 67, 3), np.uint8)
  assert grad_cam(model, variables, images, layer='relu2').shape == (1, 7, 7)
  with pytest.raises(ValueError, match='the layer fc7 has no spatial dimensions'):
    grad_cam(model, variables, images, layer='fc7')
  with pytest.raises(UsageError, match="unknown layer 'relu9'; did you mean"):
    grad_cam(model, variables, images, layer='relu9')


def test_imagenets_classes(tmp_path, monkeypatch, capsys):
  synsets = pretrained.imagenet_synsets()
  assert len(synsets) == 1000
  assert (synsets[0], synsets[-1]) == ('n01440764', 'n15075141')
  index = tmp_path / 'index.json'
  index.write_text(json.dumps({'0': ['n01440764', 'tench'], '1': ['n01443537', 'gold_fish']}))
  monkeypatch.setattr(pretrained, 'IMAGENET_INDEX', str(index))
  assert pretrained.readable(synsets[:3]) == ('tench', 'gold fish', 'n01484850')
  monkeypatch.setattr(pretrained, 'IMAGENET_INDEX', str(tmp_path / 'absent.json'))
  assert pretrained.readable(synsets[:1]) == ('n01440764',)
  assert 'stay synsets' in capsys.readouterr().err
  index.write_text('[1]')
  monkeypatch.setattr(pretrained, 'IMAGENET_INDEX', str(index))
  assert pretrained.readable(synsets[:1]) == ('n01440764',)
  assert 'is not a list of classes; remove it' in capsys.readouterr().err


def test_names_keep_odd_characters(tmp_path):
  names = (
    'a\u2028b',
    'c\x0bd',
    'é',
    '',
    ' two\nlines\r',
    '"quoted"',
    '"',
    '\ufeffmark',
    'raw \udcff',
    'back\\nslash',
  )
  pretrained.write_names(tmp_path, names)
  assert pretrained.read_names(tmp_path / pretrained.FILE) == names


def test_names_cannot_forge_lines(tmp_path, capsys):
  names = ('\x1b[2Jcat', 'dog\n  99.00%  cat', 'bird\r', 'raw \udcff')
  save_weights(tmp_path / 'w.safetensors', SPEC, random_variables(SPEC, 4), class_names=names[:3])
  (tmp_path / 'classes.txt').write_text('\n'.join(map(json.dumps, names)))
  folder = tmp_path / 'a\nerror: b'
  folder.mkdir()
  (folder / 'c\x1b[31m.png').write_bytes(encode(smooth_image(70, 70, 0), 'PNG'))
  (folder / 'd\r.png').write_bytes(b'none')
  command = [str(folder), str(tmp_path / 'w.safetensors')]
  assert main(['predict', *command, '--classes', str(tmp_path / 'classes.txt')]) == 2
  assert main(['features', *command, '--layers', 'fc8', '--out', str(folder / 'f.npz')]) == 2
  out, err = capsys.readouterr()
  assert len(out.splitlines()) == 6  # an image, four classes; a file of features
  assert len(err.splitlines()) == 4
  assert not any(control in out + err for control in '\x1b\r')
  assert r'dog\n  99.00%' in out
  assert r'raw \udcff' in out


def test_names_travel_with_weights(tmp_path, weights):
  assert pretrained.load_pretrained(weights).class_names[1] == 'great_white_shark'
  path, variables = tmp_path / 'other.safetensors', random_variables(SPEC, 8)
  save_weights(path, SPEC, variables, class_names='abcdef')
  assert pretrained.load_pretrained(path).class_names == (*'abcdef', 'class 6', 'class 7')
  save_weights(path, SPEC, variables, class_names='abcdefghi')
  with pytest.raises(UsageError, match='names of 9 classes for a network of 8'):
    pretrained.load_pretrained(path)
