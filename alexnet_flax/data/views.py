"""Crops, flips and rotations as arithmetic on image sizes, in NumPy.

A view is a function of an image's size and of numbers drawn beforehand (`sampling.view_numbers`). Nothing
here is random, and no pixel is touched: `decode.py` does that.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

Crop = Literal['random_resized_crop', 'random_crop', 'center_crop']
Resize = Literal['pil', 'tf']

# The numbers of a view: two for each attempt at a random crop, then top, left, flip, angle.
CROP_ATTEMPTS = 10
VIEW_NUMBERS = 32
_TOP, _LEFT, _FLIP, _ANGLE = range(2 * CROP_ATTEMPTS, 2 * CROP_ATTEMPTS + 4)


class Windows(NamedTuple):
  """The windows of a batch of images."""

  boxes: np.ndarray  # int32 [B, 4], (top, left, height, width) in pixels of the image; they may jut out
  mirrored: np.ndarray  # bool [B]
  degrees: np.ndarray  # float32 [B], the counter-clockwise rotation about the box's centre


@dataclasses.dataclass(frozen=True)
class TrainView:
  """A random view of a training image; raises ValueError for an impossible range or colour.

  Attributes:
    image_size: The view's side S in pixels.
    crop: 'random_resized_crop' (Szegedy et al. 2014, section 6; torchvision's rule) draws an area and an
      aspect ratio, and resizes what lies within. 'random_crop' (Krizhevsky et al. 2012, section 4.1) takes a
      window of S by S of the image whose short side is `resize_side`. 'center_crop' takes the middle one.
    crop_scale: The least and greatest area of the resized crop, as shares of the image's.
    crop_ratio: Its least and greatest width over height, drawn uniformly in the logarithm.
    crop_padding: The border that a 'random_crop' may reach into, in pixels of the view (He et al. 2015,
      section 4.2). Its colour is `rotation_fill`.
    resize_side: The short side for 'random_crop' and 'center_crop'.
    flip: Whether to mirror every second view.
    rotation: The greatest rotation either way, in degrees.
    rotation_fill: RGB, 0 ... 255, of what lies outside the image.
  """

  image_size: int = dataclasses.field(default=224, metadata={'derived': True})
  crop: Crop = 'random_resized_crop'
  crop_scale: tuple[float, float] = (0.08, 1.0)
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
  crop_padding: int = 0
  resize_side: int = dataclasses.field(default=256, metadata={'derived': True})
  flip: bool = True
  rotation: float = dataclasses.field(default=0.0, metadata={'at_most': 180})
  rotation_fill: tuple[float, float, float] = (0.0, 0.0, 0.0)

  def __post_init__(self) -> None:
    for name, (low, high) in (('crop_scale', self.crop_scale), ('crop_ratio', self.crop_ratio)):
      if not 0 < low <= high or (name == 'crop_scale' and high > 1):
        raise ValueError(f'{name} (={(low, high)}) must be (least, greatest), positive, and shares at most 1')
    if not all(0 <= value <= 255 for value in self.rotation_fill):
      raise ValueError(f'rotation_fill (={self.rotation_fill}) must be RGB in 0 ... 255')

  def windows(self, sizes: np.ndarray, numbers: np.ndarray) -> Windows:
    """Returns the windows of images by their heights and widths, int [B, 2].

    `numbers` are uniform in [0, 1), float32 [B, VIEW_NUMBERS].
    """
    match self.crop:
      case 'random_resized_crop':
        boxes = _random_resized_crops(sizes, numbers, self.crop_scale, self.crop_ratio)
      case 'random_crop':
        boxes = _random_crops(sizes, numbers, self.image_size, self.resize_side, self.crop_padding)
      case 'center_crop':
        side = _squares(sizes, self.image_size, self.resize_side)
        corner = np.round((sizes - side) / 2)  # as in evaluation
        boxes = np.concatenate([corner, side, side], axis=1).astype(np.int32)
    degrees = (2 * numbers[:, _ANGLE] - 1) * np.float32(self.rotation)
    return Windows(boxes, (numbers[:, _FLIP] < 0.5) & self.flip, degrees)

  def copies_pixels(self, height: int, width: int) -> bool:
    """Whether the views of images of this size are windows of them, neither resized, rotated nor bordered."""
    (side,) = _squares(np.array([[height, width]]), self.image_size, self.resize_side)[0]
    is_square = self.crop != 'random_resized_crop' and side == self.image_size
    return is_square and not self.crop_padding and not self.rotation


def rotated(
  windows: Windows, sizes: np.ndarray, image_size: int, ratios: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Rotation, mirroring and resizing as one affine map: the pixels that it needs, and the map.

  Args:
    windows: The windows of a batch of images.
    sizes: int [B, 2], the images' heights and widths.
    image_size: The views' side S.
    ratios: int [B], the factors by which decoding shrinks the images.

  Returns:
    int32 [B, 4], the smallest boxes in the images that hold the rotated windows; and float32 [B, 2, 3], the
    maps from (x, y, 1) of a view to (x, y) of the decoded box. Pixel centres have whole coordinates.
  """
  radians = np.deg2rad(windows.degrees.astype(np.float64))
  cos, sin = np.cos(radians), np.sin(radians)
  height, width = windows.boxes[:, 2:].T
  center = windows.boxes[:, :2] + windows.boxes[:, 2:] / 2
  reach = np.abs([cos * height, cos * width]) + np.abs([sin * width, sin * height])
  ratio = ratios[:, None]  # whole pixels of the decoded image, and one more
  first = np.clip((np.floor((center - reach.T / 2) / ratio) - 1) * ratio, 0, sizes - 1).astype(np.int32)
  last = np.clip((np.ceil((center + reach.T / 2) / ratio) + 1) * ratio, first + 1, sizes).astype(np.int32)

  x_step = np.where(windows.mirrored, -width, width) / image_size
  y_step = height / image_size
  linear = np.stack([cos * x_step, -sin * y_step, sin * x_step, cos * y_step], 1).reshape(-1, 2, 2)
  origin = first // ratio * ratio  # where a pixel of the decoded image begins
  shift = (center - origin)[:, ::-1] - linear.sum(axis=2) * ((image_size - 1) / 2)
  scaled = np.concatenate([linear, shift[:, :, None]], axis=2) / ratios[:, None, None]
  scaled[:, :, 2] -= 0.5
  return np.concatenate([first, last - first], axis=1), scaled.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class EvalView:
  """The view of an image in evaluation: its short side is resized, then squares of `image_size` are cut out.

  Attributes:
    resize: 'pil' (bilinear and antialiased, as Pillow and torchvision) or 'tf' (bilinear between four pixels,
      whatever the scale, within a level of `tf.image.resize`).
    ten_crop: Four corners and the centre, and the same mirrored (Krizhevsky et al. 2012, section 4.1).
    turn: Whether images are turned as their metadata say, as in training; None leaves those of published sets
      as they are stored, and turns all others.
  """

  image_size: int = dataclasses.field(default=224, metadata={'derived': True})
  resize_side: int = dataclasses.field(default=256, metadata={'derived': True})
  resize: Resize = 'pil'
  ten_crop: bool = False
  turn: bool | None = dataclasses.field(default=None, metadata={'derived': True})

  def resized(self, sizes: np.ndarray) -> np.ndarray:
    """Returns heights and widths after resizing, int32 [B, 2]; the long side is truncated, not rounded."""
    return (self.resize_side * sizes // sizes.min(axis=1, keepdims=True)).astype(np.int32)

  def corners(self, sizes: np.ndarray) -> np.ndarray:
    """Returns top and left of each square in the resized images, int32 [B, 1 or 6, 2].

    For ten crops: the four corners, the centre, and the centre of the mirrored image, which lies a pixel
    beside the other where an odd number of pixels is cut off (torchvision's TenCrop).
    """
    spare = self.resized(sizes) - self.image_size
    # Half pixels are rounded to even, as torchvision's CenterCrop does.
    center = np.round(spare / 2).astype(np.int32)[:, None]
    if not self.ten_crop:
      return center
    four = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int32)
    mirrored = np.stack([center[..., 0], spare[:, None, 1] - center[..., 1]], axis=-1)
    return np.concatenate([spare[:, None] * four, center, mirrored], axis=1)


def _random_resized_crops(
  sizes: np.ndarray, numbers: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
  """Returns the first of ten drawn boxes that lies in the image; failing that, the largest central one."""
  height, width = sizes[:, :1], sizes[:, 1:]
  areas, ratios = numbers[:, :CROP_ATTEMPTS], numbers[:, CROP_ATTEMPTS : 2 * CROP_ATTEMPTS]
  area = height * width * (scale[0] + areas * (scale[1] - scale[0]))
  low, high = np.log(ratio)
  aspect = np.exp(low + ratios * (high - low))
  shapes = np.stack([np.round(np.sqrt(area / aspect)), np.round(np.sqrt(area * aspect))], axis=-1)
  fits = np.all((shapes > 0) & (shapes <= sizes[:, None]), axis=-1)
  found, rows = np.any(fits, axis=1), np.arange(len(sizes))

  bounded = np.clip(width / height, *ratio)
  largest = np.concatenate([np.round(width / bounded), np.round(height * bounded)], axis=1)
  shape = np.where(found[:, None], shapes[rows, fits.argmax(axis=1)], np.clip(largest, 1, sizes))
  shape = shape.astype(np.int64)
  spare = sizes - shape
  corner = np.where(found[:, None], _choose(numbers[:, [_TOP, _LEFT]], spare), spare // 2)
  return np.concatenate([corner, shape], axis=1).astype(np.int32)


def _random_crops(
  sizes: np.ndarray, numbers: np.ndarray, image_size: int, resize_side: int, padding: int
) -> np.ndarray:
  """Returns squares anywhere in the image and a border around it."""
  side = _squares(sizes, image_size, resize_side)
  border = side * padding // image_size
  corner = _choose(numbers[:, [_TOP, _LEFT]], sizes + 2 * border - side) - border
  return np.concatenate([corner, side, side], axis=1).astype(np.int32)


def _squares(sizes: np.ndarray, image_size: int, resize_side: int) -> np.ndarray:
  """Returns the sides, int [B, 1], of squares with image_size / resize_side of the short side."""
  short = sizes.min(axis=1, keepdims=True)
  return np.maximum(np.round(short * (image_size / resize_side)), 1).astype(np.int64)


def _choose(numbers: np.ndarray, last: np.ndarray) -> np.ndarray:
  """Returns one of 0 ... last, uniformly."""
  return np.minimum((numbers * (last + 1.0)).astype(np.int64), last)
