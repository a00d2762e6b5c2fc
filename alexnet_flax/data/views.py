"""One picture as the network will see it: encoded bytes to uint8 [S, S, 3], in TensorFlow's C++.

A view is a function of the picture and of numbers drawn beforehand; nothing here is random.
"""

import tensorflow as tf

# Each attempt at a random crop takes two numbers; then its place takes two and the mirror one.
CROP_ATTEMPTS = 10
VIEW_NUMBERS = 2 * CROP_ATTEMPTS + 3


def train_view(
  encoded: tf.Tensor,
  numbers: tf.Tensor,
  *,
  image_size: int,
  crop_scale: tuple[float, float],
  crop_ratio: tuple[float, float],
  flip: bool,
) -> tf.Tensor:
  """A random resized crop, perhaps mirrored (Szegedy et al. 2014, section 6; torchvision's rule).

  Args:
    encoded: JPEG, PNG, GIF or BMP.
    numbers: float32 [VIEW_NUMBERS] in [0, 1).
    image_size: the view's side S in pixels.
    crop_scale: least and greatest area of the crop, as shares of the picture's.
    crop_ratio: least and greatest width over height, drawn evenly in the logarithm.
    flip: mirror every second view.

  Returns:
    uint8 [S, S, 3], RGB.
  """

  def window(height: tf.Tensor, width: tf.Tensor) -> tuple[tf.Tensor, ...]:
    return _random_crop(height, width, numbers, crop_scale, crop_ratio)

  crop = _decode_window(encoded, window, 'INTEGER_FAST')
  view = _resize(crop, (image_size, image_size))
  if flip:
    view = tf.cond(numbers[-1] < 0.5, lambda: tf.reverse(view, [1]), lambda: view)
  return tf.ensure_shape(view, (image_size, image_size, 3))


def eval_view(encoded: tf.Tensor, *, image_size: int, resize_side: int) -> tf.Tensor:
  """The picture's short side resized to `resize_side`, then its centre of side S = `image_size`.

  Returns:
    uint8 [S, S, 3], RGB.
  """
  picture = _decode_window(encoded, lambda height, width: (0, 0, height, width), 'INTEGER_ACCURATE')
  height, width = tf.shape(picture)[0], tf.shape(picture)[1]
  short = tf.minimum(height, width)
  # The long side is cut, not rounded, and half pixels are rounded: torchvision's Resize, CenterCrop.
  resized = _resize(picture, (resize_side * height // short, resize_side * width // short))
  top, left = (_round((tf.shape(resized)[axis] - image_size) / 2) for axis in (0, 1))
  view = resized[top : top + image_size, left : left + image_size]
  return tf.ensure_shape(view, (image_size, image_size, 3))


def _decode_window(encoded: tf.Tensor, window, dct_method: str) -> tf.Tensor:
  """Decodes RGB within window(height, width) -> (top, left, height, width); JPEG in one pass."""

  def jpeg() -> tf.Tensor:
    shape = tf.io.extract_jpeg_shape(encoded)
    box = tf.stack(window(shape[0], shape[1]))
    return tf.io.decode_and_crop_jpeg(encoded, box, channels=3, dct_method=dct_method)

  def other() -> tf.Tensor:
    picture = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    top, left, height, width = window(tf.shape(picture)[0], tf.shape(picture)[1])
    return picture[top : top + height, left : left + width]

  return tf.cond(tf.io.is_jpeg(encoded), jpeg, other)


def _random_crop(
  height: tf.Tensor,
  width: tf.Tensor,
  numbers: tf.Tensor,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[tf.Tensor, ...]:
  """The first of ten drawn boxes that lies in the picture; failing that, the largest central one."""
  areas, ratios = numbers[:CROP_ATTEMPTS], numbers[CROP_ATTEMPTS : 2 * CROP_ATTEMPTS]
  full_height, full_width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
  area = full_height * full_width * (scale[0] + areas * (scale[1] - scale[0]))
  low, high = tf.math.log(ratio[0]), tf.math.log(ratio[1])
  aspect = tf.exp(low + ratios * (high - low))
  heights, widths = _round(tf.sqrt(area / aspect)), _round(tf.sqrt(area * aspect))
  fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
  first = tf.argmax(fits)

  bounded = tf.clip_by_value(full_width / full_height, ratio[0], ratio[1])
  largest_height = tf.minimum(height, _round(full_width / bounded))
  largest_width = tf.minimum(width, _round(full_height * bounded))
  found = fits[first]
  crop_height = tf.where(found, heights[first], largest_height)
  crop_width = tf.where(found, widths[first], largest_width)
  spare_height, spare_width = height - crop_height, width - crop_width
  top = tf.where(found, _choose(numbers[-3], spare_height), spare_height // 2)
  left = tf.where(found, _choose(numbers[-2], spare_width), spare_width // 2)
  return top, left, crop_height, crop_width


def _choose(number: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
  """One of 0 ... last, evenly."""
  return tf.minimum(tf.cast(number * tf.cast(last + 1, tf.float32), tf.int32), last)


def _resize(picture: tf.Tensor, size: tuple[tf.Tensor | int, tf.Tensor | int]) -> tf.Tensor:
  """Bilinear, antialiased where it shrinks; uint8 in and out."""
  resized = tf.image.resize(picture, size, antialias=True)
  return tf.saturate_cast(tf.round(resized), tf.uint8)


def _round(x: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.round(x), tf.int32)
