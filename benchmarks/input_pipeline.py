"""Throughput of the input: ours in each form, the usual JAX recipe, torchvision, and JPEG decoding alone.

  python benchmarks/input_pipeline.py [--images DIR] [--torch-python PATH] [--rounds 5]

All programs load 224x224 views of the same images (JPEG files in DIR, or pieces of scikit-learn's two
photographs), each in its own process, in turn; the figures are medians of the rounds. Ours has a
deterministic order and deterministic views. 'cropped_on_device' are whole raw images with their windows,
which the device cuts out; 'tiny' are images of 16x16, the price of Python an image. Then come ours by number
of threads and processes, and its memory over 10,000 batches. The last line is one JSON object of images/s; a
peer that is not installed is null.
"""

import argparse
import concurrent.futures
import io
import json
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile

import numpy as np
from peers import Worker, compare

SIZE = 224
BATCH = 64
WARM_UNITS = 16  # batches buffered before a round are not counted
NAME = 'images'


def usual_jax(data_dir: str, folder: str):
  """The input of flax's ImageNet example: decode_and_crop_jpeg, bicubic, float32, normalized; shuffled."""
  del folder
  import tensorflow as tf
  import tensorflow_datasets as tfds

  mean, deviation = [[[123.7, 116.3, 103.5]]], [[[58.4, 57.1, 57.4]]]

  def decode(example):
    encoded = example['image']
    shape = tf.io.extract_jpeg_shape(encoded)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      shape,
      tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4]),
      min_object_covered=0.1,
      aspect_ratio_range=(3 / 4, 4 / 3),
      area_range=(0.08, 1.0),
      max_attempts=10,
      use_image_if_no_bounding_boxes=True,
    )
    window = tf.stack([begin[0], begin[1], size[0], size[1]])
    image = tf.io.decode_and_crop_jpeg(encoded, window, channels=3)
    image = tf.image.resize(image, (SIZE, SIZE), tf.image.ResizeMethod.BICUBIC)
    image = tf.image.random_flip_left_right(image)
    return {'image': (image - mean) / deviation, 'label': example['label']}

  dataset = tfds.load(
    NAME, split='train', data_dir=data_dir, decoders={'image': tfds.decode.SkipDecoding()}, shuffle_files=True
  )
  dataset = dataset.repeat().shuffle(16 * BATCH).map(decode, tf.data.AUTOTUNE)
  return _pull(dataset.batch(BATCH, drop_remainder=True).prefetch(10).as_numpy_iterator())


def torchvision(data_dir: str, folder: str):
  """torchvision's reference: ImageFolder, RandomResizedCrop, flip, normalized; one worker per core."""
  del data_dir
  import torch
  from torchvision import datasets, transforms

  view = transforms.Compose(
    [
      transforms.RandomResizedCrop(SIZE),
      transforms.RandomHorizontalFlip(),
      transforms.ToTensor(),
      transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
  )
  torch.set_num_threads(1)
  loader = torch.utils.data.DataLoader(
    datasets.ImageFolder(folder, view),
    batch_size=BATCH,
    shuffle=True,
    drop_last=True,
    num_workers=os.cpu_count() or 1,
    persistent_workers=True,
  )

  def forever():
    while True:
      yield from loader

  return _pull(forever())


def ours(data_dir: str, folder: str, **options):
  """This package's batches for training, from the originals or from a prepared form."""
  del folder
  return _pull(_our_batches(data_dir, **options))


def jpeg_decode_limit(data_dir: str, folder: str):
  """libjpeg-turbo, by way of OpenCV, decoding whole images in memory, one thread per core."""
  del data_dir
  import cv2

  cv2.setNumThreads(1)
  images = [np.fromfile(path, np.uint8) for path in sorted(pathlib.Path(folder).rglob('*.jpg'))]
  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

  def work(times: int) -> None:
    chosen = (images[number % len(images)] for number in range(times * BATCH))
    for _ in pool.map(lambda data: cv2.imdecode(data, cv2.IMREAD_COLOR) is None, chosen):
      pass

  return work


def memory(data_dir: str, options: dict, batches: int) -> list[int]:
  """Returns the megabytes of this process and its children after each tenth of the batches (of 16).

  What they share counts once (PSS).
  """
  seen = []
  stream = _our_batches(data_dir, batch_size=16, **options)
  for number in range(1, batches + 1):
    next(stream)
    if number % (batches // 10) == 0:
      children = pathlib.Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()
      processes = [os.getpid(), *children]
      texts = [pathlib.Path(f'/proc/{one}/smaps_rollup').read_text() for one in processes]
      seen.append(sum(int(re.search(r'Pss: +(\d+)', text)[1]) for text in texts) >> 10)
  return seen


def _our_batches(
  data_dir: str,
  form: str = '',
  crop: str = 'random_resized_crop',
  batch_size: int = BATCH,
  threads: int | None = None,
  size: int = SIZE,
  processes: int = 0,
  crop_on: str = 'host',
):
  from alexnet_flax.data import loader as pipeline
  from alexnet_flax.data.bad_images import BadImages
  from alexnet_flax.data.processes import TrainingExamples, process_batches
  from alexnet_flax.data.raw import RawImages
  from alexnet_flax.data.tfds_source import open_dataset
  from alexnet_flax.data.views import TrainView

  name, view = '_'.join([NAME, *filter(None, [form])]), TrainView(size, crop, resize_side=round(size * 8 / 7))
  source = open_dataset(name, 'train', data_dir)
  if processes:
    plan = pipeline.train_plan(source.num_examples, 0, batch_size)
    examples = TrainingExamples(name, 'train', data_dir, None, True, None, 'none', 0, BadImages())
    return process_batches(examples, view, plan, range(1 << 30), processes)
  return pipeline.train_batches(
    source,
    view,
    seed=0,
    batch_size=batch_size,
    first_step=0,
    last_step=1 << 30,
    num_threads=threads,
    raw=RawImages.of(source, view) if crop_on == 'device' else None,
  )


def _pull(batches):
  def work(times: int) -> None:
    for _ in range(times):
      next(batches)

  return work


PEERS = {
  'usual_jax': usual_jax,
  'torchvision': torchvision,
  'originals': ours,
  'prepared_jpeg_resized_crop': ours,
  'prepared_jpeg': ours,
  'raw': ours,
  'raw_cropped_on_device': ours,
  'tiny_raw': ours,
  'tiny_raw_cropped_on_device': ours,
  'jpeg_decode_limit': jpeg_decode_limit,
}
FORMS = {
  'originals': {},
  'prepared_jpeg_resized_crop': {'form': '256_q90'},
  'prepared_jpeg': {'form': '256_q90', 'crop': 'random_crop'},
  'raw': {'form': '256_center_raw', 'crop': 'random_crop'},
  'raw_cropped_on_device': {'form': '256_center_raw', 'crop': 'random_crop', 'crop_on': 'device'},
  'tiny_raw': {'form': '16_center_raw', 'crop': 'random_crop', 'size': 14},
  'tiny_raw_cropped_on_device': {
    'form': '16_center_raw',
    'crop': 'random_crop',
    'size': 14,
    'crop_on': 'device',
  },
}
_MEMORY = (
  ('threads', 'prepared_jpeg_resized_crop', {}),
  ('2 processes', 'prepared_jpeg_resized_crop', {'processes': 2}),
  ('gathered', 'raw_cropped_on_device', {}),
)


def pack(images: list[bytes], root: pathlib.Path) -> None:
  """The images as a folder of two classes, as a TFDS data set, and in its prepared forms."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  from alexnet_flax.data.prepare.resize import ImageFormat, prepare_smaller

  target = root / NAME / '1.0.0'
  target.mkdir(parents=True)
  template = tfds.core.ShardedFileTemplate(
    data_dir=target, dataset_name=NAME, split='train', filetype_suffix='tfrecord'
  )
  features = tfds.features.FeaturesDict(
    {'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
     'label': tfds.features.ClassLabel(names=['even', 'odd'])}
  )  # fmt: skip
  with tf.io.TFRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1))) as writer:
    for number, image in enumerate(images):
      path = root / 'folder' / str(number % 2) / f'{number}.jpg'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(image)
      writer.write(features.serialize_example({'image': io.BytesIO(image), 'label': number % 2}))
  info = tfds.core.SplitInfo('train', [len(images)], 0, template)
  tfds.folder_dataset.write_metadata(
    data_dir=target,
    features=features,
    split_infos=[info],
    check_data=False,
    supervised_keys=('image', 'label'),
  )
  for form in (ImageFormat(256), *(ImageFormat(side, 'raw', crop='center') for side in (256, 16))):
    prepare_smaller(NAME, form, data_dir=str(root))


def find_images(folder: str | None) -> list[bytes]:
  """JPEG files, or pieces of scikit-learn's photographs; a thousand at most."""
  if folder:
    paths = [
      path for path in sorted(pathlib.Path(folder).rglob('*')) if path.suffix.lower() in ('.jpg', '.jpeg')
    ]
    found = [path.read_bytes() for path in paths[:1000]]
    return found or sys.exit(f'error: no .jpg or .jpeg in {folder}')
  import cv2
  from sklearn.datasets import load_sample_images

  pieces = []
  for number in range(256):
    image = load_sample_images().images[number % 2]
    top, left = number // 2 % 8 * 6, number // 16 * 8
    piece = np.ascontiguousarray(image[top : top + 375, left : left + 500, ::-1])
    pieces.append(cv2.imencode('.jpg', piece, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
  return pieces


def main() -> None:
  """Prints the rounds, a table, and one JSON object."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
  parser.add_argument('--images', help='a folder of JPEG files')
  parser.add_argument('--torch-python', default=sys.executable)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--batches', type=int, default=48, help='a round')
  parser.add_argument('--memory-batches', type=int, default=10_000, help='0 for none')
  options = parser.parse_args()
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
  images = find_images(options.images)
  kilobytes = sum(map(len, images)) / len(images) / 1000
  print(f'{len(images)} images, {kilobytes:.0f} KB on average; {os.cpu_count()} cores')
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(temporary)
    pack(images, root)
    arguments = {'data_dir': str(root), 'folder': str(root / 'folder')}
    file = pathlib.Path(__file__).name

    def worker(name: str, label: str | None = None, **more: object) -> Worker:
      python = options.torch_python if name == 'torchvision' else sys.executable
      made = Worker(file, name, python, **arguments, **FORMS.get(name, {}), **more)
      made.name = label or name
      return made

    made = options.batches * BATCH
    seconds = compare([worker(name) for name in PEERS], options.batches, options.rounds)
    rates = {name: None if value is None else round(made / value) for name, value in seconds.items()}
    for name, rate in rates.items():
      print(
        f'{name:28} '
        + ('absent' if rate is None else f'{rate:7,} images/s  {rate / rates["usual_jax"]:5.2f}')
      )
    for name in ('originals', 'prepared_jpeg', 'raw', 'raw_cropped_on_device'):
      ways = {'1 thread': {'threads': 1}, '2 threads': {'threads': 2}}
      if name in ('originals', 'prepared_jpeg'):
        ways |= {'1 process': {'processes': 1}, '2 processes': {'processes': 2}}
      workers = [worker(name, label=label, **way) for label, way in ways.items()]
      by_way = compare(workers, options.batches, 3)
      shown = ', '.join(f'{label} {round(made / (value or 1)):,}' for label, value in by_way.items())
      print(f'{name}, images/s: {shown}')
    for label, name, more in _MEMORY if options.memory_batches else ():
      with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as alone:
        seen = alone.submit(memory, str(root), FORMS[name] | more, options.memory_batches).result()
      growth = (seen[-1] - seen[0]) / seen[0]
      print(
        f'{name}, {label}: MB after each tenth of {options.memory_batches:,} batches {seen};'
        f' from the first to the last {growth:+.1%}'
      )
  print(json.dumps(rates))


if __name__ == '__main__':
  main()
