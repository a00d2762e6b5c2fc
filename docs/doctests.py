"""For the API's pages: doctests in docstrings are shown as code."""

import re

import griffe


class Doctests(griffe.Extension):
  """Fences each paragraph that begins with a prompt."""

  def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
    """Called for every object that has been read."""
    if obj.docstring:
      obj.docstring.value = re.sub(
        r'(?m)^>>> (?:.+\n?)+', lambda found: f'```pycon\n{found[0].rstrip()}\n```\n', obj.docstring.value
      )
