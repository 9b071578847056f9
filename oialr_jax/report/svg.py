"""Figures as SVG within a page, in the page's font and colours."""

import html
import io
import re
import warnings

import matplotlib as mpl

from oialr_jax.report import drawing

# The page has each of them for the light and for the dark.
_VARIABLES = {
  '#000000': 'var(--ink)',
  '#b0b0b0': 'var(--soft)',
  '#808080': 'var(--soft)',
}
_CYCLE = (
  '#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd '
  '#8c564b #e377c2 #7f7f7f #bcbd22 #17becf'
)
_VARIABLES |= {c: f'var(--c{i})' for i, c in enumerate(_CYCLE.split())}


def inline(figure: drawing.Figure, label: str) -> str:
  """The `<svg>` element of a figure.

  Args:
    figure: in Matplotlib's default colours.
    label: what it is, for who does not see it; of its own within the page.
  """
  settings = {
    'svg.fonttype': 'none',
    'svg.hashsalt': label,  # of the names by which parts refer to parts
    'font.sans-serif': ['DejaVu Sans'],
  }
  file = io.StringIO()
  with mpl.rc_context(settings), warnings.catch_warnings():
    # The page's font may have the letters that Matplotlib's lacks.
    warnings.filterwarnings('ignore', 'Glyph .* missing')
    figure.savefig(file, format='svg', transparent=True, dpi=200)
  text = file.getvalue()
  box = re.search(r'viewBox="([^"]*)"', text)[1]
  start = text.index('</metadata>') + len('</metadata>')
  text = re.sub(r'<g id="[^"]*"', '<g', text[start:])  # the same in all figures
  text = re.sub(r'<style.*?</style>', '', text, count=1, flags=re.DOTALL)
  text = re.sub(
    r'(?<=fill: |roke: )#\w{6}', lambda m: _VARIABLES.get(m[0], m[0]), text
  )
  name = html.escape(label)
  return f'<svg viewBox="{box}" role="img" aria-label="{name}">{text.strip()}'
