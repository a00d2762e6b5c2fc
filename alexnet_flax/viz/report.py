"""`alexnet-flax report`: the page itself."""

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from alexnet_flax.errors import UsageError
from alexnet_flax.viz.charts import Series, line_chart
from alexnet_flax.viz.figures import page_template
from alexnet_flax.viz.report_content import Content, content, curve, evaluated_split
from alexnet_flax.viz.report_run import Subject

FILE = 'report.html'


def write_report(subjects: Sequence[Subject], path: pathlib.Path) -> None:
  """Writes one page of one run, or of several with a comparison.

  Args:
    subjects: the runs.
    path: of the page.

  Raises:
    UsageError: it cannot be written.
  """
  runs = [content(subject) for subject in subjects]
  page = page_template('report.html').render(
    title=' · '.join(subject.name for subject in subjects),
    runs=runs,
    comparison=_comparison(runs) if len(runs) > 1 else None,
  )
  partial = path.with_name(f'.partial-{os.getpid()}-{path.name}')
  try:
    partial.write_text(page, encoding='utf-8')
    partial.replace(path)
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror}') from None
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def _comparison(runs: Sequence[Content]) -> dict[str, Any]:
  """Curves of all runs in one, and the keys in which they differ."""
  charts = []
  for title, label, name, options in (
    ('Evaluated loss', 'loss', 'loss', {}),
    ('Evaluated accuracy, the first answer', 'top-1', 'top1', {'percent': True}),
  ):
    series = [
      Series(run.subject.name, *curve(run.subject, evaluated_split(run.subject), name), color=number)
      for number, run in enumerate(runs)
    ]
    charts.append((title, line_chart(series, 'epoch', label, **options)))
  configurations = [dict(run.configuration) for run in runs]
  differences = [
    (key, [one.get(key, '') for one in configurations])
    for key in configurations[0]
    if len({one.get(key) for one in configurations}) > 1
  ]
  return {'charts': charts, 'differences': differences}
