"""What to do with images that cannot be decoded: raise an error, or skip, name and count them."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from alexnet_flax.errors import UsageError

Policy = Literal['error', 'skip']


@dataclasses.dataclass
class BadImages:
  """Handles images that cannot be decoded.

  Attributes:
    policy: Whether such an image is an error or is skipped.
    say: Receives a line when an image is first skipped.
    option: What an error names for skipping.
    skipped: How often an image was skipped.
    reasons: The reason for each skipped image, by name.
  """

  policy: Policy = 'error'
  say: Callable[[str], None] = print
  option: str = 'data.on_bad_image=skip'
  skipped: int = 0
  reasons: dict[str, str] = dataclasses.field(default_factory=dict)

  def report(self, name: str, reason: str) -> None:
    """Counts an image as skipped.

    Raises:
      UsageError: The policy is 'error'.
    """
    if self.policy == 'error':
      raise UsageError(f'{name} cannot be decoded: {reason}; repair or remove it, or set {self.option}')
    self.skipped += 1
    if name not in self.reasons:
      self.reasons[name] = reason
      self.say(f'skipped: {name} cannot be decoded: {reason}')

  def summary(self) -> str:
    """A line for the end of a run; empty if nothing was skipped."""
    if not self.skipped:
      return ''
    return f'{len(self.reasons)} images cannot be decoded and were skipped ({self.skipped} times)'
