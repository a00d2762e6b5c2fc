"""What to do with images that cannot be decoded: raise an error, or skip, name and count them."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from alexnet_flax.data.images import MAX_PIXELS
from alexnet_flax.errors import UsageError, one_line

Policy = Literal['error', 'skip']


@dataclasses.dataclass
class BadImages:
  """What is a bad image, and what to do with one: it cannot be decoded, or has more than `max_pixels`."""

  policy: Policy = 'error'
  say: Callable[[str], None] = print  # receives a line when an image is first skipped
  option: str = 'data.on_bad_image=skip'  # which an error names
  max_pixels: int = MAX_PIXELS
  skipped: int = 0  # how often an image was skipped
  reasons: dict[str, str] = dataclasses.field(default_factory=dict)  # by the image's name

  def report(self, name: str, reason: str) -> None:
    """Counts an image as skipped; raises UsageError if the policy is 'error'."""
    if self.policy == 'error':
      raise UsageError(f'{name} cannot be decoded: {reason}; repair or remove it, or set {self.option}')
    self.skipped += 1
    if name not in self.reasons:
      self.reasons[name] = reason
      self.say(one_line(f'skipped: {name} cannot be decoded: {reason}'))

  def summary(self) -> str:
    """A line for the end of a run; empty if nothing was skipped."""
    if not self.skipped:
      return ''
    return f'{len(self.reasons)} images cannot be decoded and were skipped ({self.skipped} times)'
