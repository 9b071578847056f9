"""Tests of report.html in a headless browser."""

import pytest

from oialr_jax import report
from tests import browser
from tests import report_page_test
from tests import report_runs_test
from tests import report_test

# Pairs of texts of a plot that lie upon one another, and texts outside of it;
# boxes are a little larger than letters.
TEXTS = """svg => {
  const outer = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('text')].map(text => {
    const {left, right, top, bottom} = text.getBoundingClientRect();
    return {text: text.textContent, left: left + 1, right: right - 1,
            top: top + (bottom - top) / 5, bottom: bottom - (bottom - top) / 5};
  });
  const outside = boxes.filter(b => b.left < outer.left - 2 ||
    b.right > outer.right + 2 || b.top < outer.top || b.bottom > outer.bottom);
  const overlapping = boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
    a.left < b.right && b.left < a.right && a.top < b.bottom &&
    b.top < a.bottom).map(b => [a.text, b.text]));
  return {count: boxes.length, outside, overlapping};
}"""


@pytest.fixture(scope='module')
def chromium():
  with browser.launch() as launched:
    yield launched


@pytest.fixture
def visit(chromium):
  """Opens a page; what it complains of or asks for is collected."""
  contexts = []

  def visit(path, width=1200, scheme='light'):
    context = chromium.new_context(
      viewport={'width': width, 'height': 800}, color_scheme=scheme
    )
    contexts.append(context)
    page = context.new_page()
    page.said, page.requests = [], []
    page.on('console', lambda message: page.said.append(message.text))
    page.on('pageerror', lambda error: page.said.append(str(error)))
    page.on('request', lambda request: page.requests.append(request.url))
    page.goto(path.resolve().as_uri())
    return page

  yield visit
  for context in contexts:
    context.close()


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  return report.write(report_runs_test.workdir(tmp_path_factory.mktemp('run')))


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """Of a network with as many layers as ViT-B/16, by longer names."""
  folder = tmp_path_factory.mktemp('large')
  records = report_test.records(paths=report_test.many(75))
  (folder / 'metrics.jsonl').write_text(report_runs_test.lines(records))
  return report.write(folder)


def column(page, heading, name):
  """Cells of a column of the table below a heading."""
  return page.evaluate(
    """([heading, name]) => {
      const title = [...document.querySelectorAll('h2, h3')]
        .find(h => h.textContent === heading);
      let table = title;
      while (!table.matches('.table')) table = table.nextElementSibling;
      const head = [...table.querySelectorAll('th')]
        .find(th => th.textContent === name);
      return [...table.querySelectorAll('tbody tr')]
        .map(row => row.cells[head.cellIndex].textContent);
    }""",
    [heading, name],
  )


def background(page):
  return page.evaluate('getComputedStyle(document.body).backgroundColor')


def test_it_renders_without_a_complaint_or_a_request(visit, digits):
  page = visit(digits)
  assert page.said == []
  assert page.requests == [digits.resolve().as_uri()]
  plots = page.locator('details[open] svg, main > .plots svg')
  assert plots.count() == 8
  for i in range(8):
    box = plots.nth(i).bounding_box()
    assert box['width'] > 300 and box['height'] > 80


def test_tables_are_sorted_by_a_click(visit, digits):
  page = visit(digits)
  header = page.locator('h3:text-is("Events") + .table th button')
  by = lambda name: header.filter(has_text=name).first.click()
  steps = lambda: column(page, 'Events', 'step')
  assert steps() == ['10', '20', '30']
  by('step')
  assert steps() == ['10', '20', '30']
  by('step')
  assert steps() == ['30', '20', '10']
  by('mean rank before')  # of which the transition has none
  assert column(page, 'Events', 'mean rank before') == ['4', '8', '\u2013']
  by('mean rank before')
  assert column(page, 'Events', 'mean rank before') == ['8', '4', '\u2013']
  by('event')
  assert column(page, 'Events', 'event') == ['transition', 'update', 'update']
  assert page.locator('th[aria-sort]').count() == 1
  assert page.said == []


def test_it_is_dark_or_light_as_asked(visit, digits):
  light, dark = (visit(digits, scheme=s) for s in ('light', 'dark'))
  assert background(light) == 'rgb(244, 245, 247)'
  assert background(dark) == 'rgb(20, 23, 26)'
  text = dark.locator('svg text').first
  assert text.evaluate('x => getComputedStyle(x).fill') == 'rgb(227, 230, 233)'
  dark.click('#theme')
  assert background(dark) == background(light)
  dark.click('#theme')
  assert background(dark) == 'rgb(20, 23, 26)'


@pytest.mark.parametrize('name', ['digits', 'large'])
def test_it_fits_a_phone(visit, name, request):
  page = visit(request.getfixturevalue(name), width=390)
  page.evaluate('document.querySelectorAll("details").forEach(d => d.open = 1)')
  assert page.evaluate('document.documentElement.scrollWidth') == 390
  sizes = page.locator('svg text').evaluate_all(
    'all => all.map(x => x.getBoundingClientRect()).map(b => '
    'Math.min(b.width, b.height)).filter(x => x)'
  )
  assert min(sizes) > 5.5


@pytest.mark.parametrize('name', ['digits', 'large'])
def test_no_text_of_a_plot_lies_upon_another(visit, name, request):
  page = visit(request.getfixturevalue(name))
  page.evaluate('document.querySelectorAll("details").forEach(d => d.open = 1)')
  for plot in page.locator('svg').element_handles():
    found = plot.evaluate(TEXTS)
    assert found['count'] > 5
    assert found['outside'] == [] and found['overlapping'] == []


def test_what_files_hold_is_not_run(visit, tmp_path):
  page = visit(report.write(report_page_test.hostile(tmp_path)))
  assert page.evaluate('typeof hacked') == 'undefined'
  assert page.said == [] and len(page.requests) == 1
  assert page.locator('svg text', has_text='<script>').count() > 1
  assert page.locator('td', has_text='<script>').count() > 5
