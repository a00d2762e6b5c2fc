"""What to do with images that cannot be decoded: raise an error, or skip, name and count them."""

from collections.abc import Callable
from typing import Literal

from alexnet_flax.errors import UsageError

Policy = Literal['error', 'skip']


class BadImages:
  """Handles images that cannot be decoded.

  Attributes:
    skipped: How often an image was skipped.
    reasons: The reason for each skipped image, by name.
  """

  def __init__(
    self,
    policy: Policy = 'error',
    say: Callable[[str], None] = print,
    option: str = 'data.on_bad_image=skip',
  ):
    """`say` receives a line when an image is first skipped; errors name the `option` for skipping."""
    self.policy: Policy = policy
    self.say: Callable[[str], None] = say
    self.option: str = option
    self.skipped: int = 0
    self.reasons: dict[str, str] = {}

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
