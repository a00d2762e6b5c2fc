"""Images that cannot be decoded: an error, or left out, counted and named."""

from collections.abc import Callable
from typing import Literal

from alexnet_flax.errors import UsageError

Policy = Literal['error', 'skip']


class BadImages:
  """What became of images that cannot be decoded.

  Attributes:
    skipped: how often one was left out.
    reasons: name -> why, of each.
  """

  def __init__(
    self,
    policy: Policy = 'error',
    say: Callable[[str], None] = print,
    option: str = 'data.on_bad_image=skip',
  ):
    """`say` is given a line when an image is left out for the first time; `option` asks for that."""
    self.policy, self.say, self.option = policy, say, option
    self.skipped = 0
    self.reasons: dict[str, str] = {}

  def report(self, name: str, reason: str) -> None:
    """Takes note of an image that is left out.

    Raises:
      UsageError: it may not be.
    """
    if self.policy == 'error':
      raise UsageError(f'{name} cannot be decoded: {reason}; mend or remove it, or set {self.option}')
    self.skipped += 1
    if name not in self.reasons:
      self.reasons[name] = reason
      self.say(f'skipped: {name} cannot be decoded: {reason}')

  def summary(self) -> str:
    """A line for the end of a run, or nothing."""
    if not self.skipped:
      return ''
    return f'{len(self.reasons)} images cannot be decoded and were left out ({self.skipped} times)'
