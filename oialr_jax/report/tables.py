"""Sortable tables of a page."""

from collections.abc import Mapping, Sequence
import html
import statistics

_TEXT = ' class="text"'

Value = str | int | float | Sequence[float] | None


def table(rows: Sequence[Mapping[str, Value]], style: str = '') -> str:
  """Rows by the names of their columns; the first column names the row.

  Args:
    rows: a number, a text, several numbers, of which mean and deviation are
      shown, or None for nothing; a column of nothing is left out.
    style: a class of the page's style sheet.
  """
  names = dict.fromkeys(name for row in rows for name in row)
  names = [n for n in names if any(row.get(n) is not None for row in rows)]
  texts = {n for row in rows for n, value in row.items() if _is_text(value)}
  head = ''.join(
    f'<th scope="col"{_TEXT if name in texts else ""}>'
    f'<button>{text(name)}</button></th>'
    for name in names
  )
  body = '\n'.join(
    f'<tr>{"".join(_cell(row.get(name)) for name in names)}</tr>'
    for row in rows
  )
  return (
    f'<div class="table {style}" tabindex="0"><table>\n'
    f'<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
  )


def text(value: object) -> str:
  """Text of a file, for a page."""
  return html.escape(str(value))


def _cell(value: Value) -> str:
  if isinstance(value, (int, float)):
    return f'<td data-value="{float(value)}">{_shown(value)}</td>'
  if _is_text(value):
    return f'<td{_TEXT}>{text(value)}</td>'
  if not value:
    return '<td class="empty">\u2013</td>'
  mean = statistics.fmean(value)
  shown = _shown(mean)
  if len(value) > 1:
    shown += f' \u00b1 {statistics.stdev(value):.2g}'
  return f'<td data-value="{mean}">{shown}</td>'


def _is_text(value: Value) -> bool:
  return isinstance(value, str)


def _shown(value: float) -> str:
  """A number in four digits, or all of those before the point."""
  if isinstance(value, int) or 1e3 <= abs(value) < 1e15:
    return f'{value:,.0f}'
  return f'{value:.4g}'
