"""docs/results.md is written from the files in results/."""

import pathlib

from docs.results import markdown


def test_the_page_is_current():
  page = pathlib.Path('docs/results.md').read_text()
  assert page == markdown(), 'run: python -m docs.results > docs/results.md'
