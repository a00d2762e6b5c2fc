"""The embedded data set: scikit-learn's 1,797 handwritten digits as a TFDS builder."""

from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from alexnet_flax.data.source import rank_in_class

NAME = 'digits'
_EVERY = 5


class _Digits(tfds.core.GeneratorBasedBuilder):
  """8x8 grey scans of handwritten digits in a fixed, stratified split: 1,433 for training, 364 for testing.

  Scikit-learn ships the test part of UCI's 'Optical Recognition of Handwritten Digits' with values 0 ... 16;
  here they are 0 ... 255. Every fifth example of each class, in the file's order, is a test example.
  """

  name = NAME
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(num_classes=10),
          'index': tfds.features.Scalar(np.int64, doc="The example's number in scikit-learn's file."),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://archive.ics.uci.edu/dataset/80',
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(False), 'test': self._generate_examples(True)}

  def _generate_examples(self, test: bool):
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    images = np.round(scans.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    for index in np.flatnonzero((rank_in_class(labels) % _EVERY == 0) == test):
      yield int(index), {'image': images[index], 'label': int(labels[index]), 'index': int(index)}


digits_builder: Callable[..., tfds.core.DatasetBuilder] = _Digits
