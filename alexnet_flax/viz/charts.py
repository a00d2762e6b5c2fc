"""Line charts as inline SVG that uses the page's font and colours, light and dark."""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from alexnet_flax.errors import one_line

# Placeholders that are replaced by the page's colours: text, and one for each series.
_TEXT = '#0a0b0c'
_SERIES = tuple(f'#0102{number:02x}' for number in range(8))


class Series(NamedTuple):
  """A curve: its label in the legend, its points, and the number of the page's colour, from 0."""

  label: str
  xs: Sequence[float]
  ys: Sequence[float]
  color: int


def line_chart(series: Sequence[Series], x_label: str, y_label: str, *, percent: bool = False) -> str:
  """Draws curves as an SVG element; its colours are the page's variables (--series-0, ..., currentColor).

  The axis is logarithmic where a few values would flatten all others.
  """
  style: Any = {
    'svg.fonttype': 'none',
    'svg.hashsalt': 'alexnet_flax',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'font.size': 9,
    'text.parse_math': False,  # a name may contain a dollar sign
    **dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'), _TEXT),
  }
  with matplotlib.rc_context(style):
    figure = Figure(figsize=(4.6, 2.7), layout='constrained')
    axes = figure.subplots()
    lines = []
    for one in series:
      color, marker = _SERIES[one.color % len(_SERIES)], '.' if len(one.xs) < 30 else None
      lines += axes.plot(one.xs, one.ys, color=color, marker=marker, linewidth=1.6)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=_TEXT, alpha=0.12, linewidth=0.6)
    values = np.concatenate([one.ys for one in series])
    values = values[np.isfinite(values)]
    if not percent and len(values) > 3 and values.min() > 0:
      low, high = np.quantile(values, (0.1, 0.8))
      if high - low < 0.05 * (values.max() - values.min()):
        axes.set_yscale('log')
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter('{x:g}'))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    if percent:
      axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=None))
    if len(series) > 1:
      axes.legend(lines, [one_line(one.label) for one in series], frameon=False, fontsize=8)
    buffer = io.StringIO()
    with warnings.catch_warnings(
      action='ignore'
    ):  # of letters that matplotlib's font lacks: the page has its own
      figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None, 'Creator': None})
  return _for_page(buffer.getvalue(), f'{y_label} by {x_label}')


def _for_page(svg: str, title: str) -> str:
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r'<svg ', f'<svg role="img" aria-label="{title}" ', svg, count=1)
  svg = re.sub(r' (width|height)="[\d.]+pt"', '', svg, count=2)
  svg = svg.replace(_TEXT, 'currentColor')
  svg = re.sub(r'font-family: [^;"]*', 'font-family: inherit', svg)
  for number, color in enumerate(_SERIES):
    svg = svg.replace(color, f'var(--series-{number})')
  return svg
