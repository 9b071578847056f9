"""The notebooks: committed without outputs, which a run of each makes here.

As they were executed they lie in build/notebooks afterwards, to be looked at.
"""

import json
import os
import pathlib

# Its cache of fonts is built here, or every kernel would say that it does so.
import matplotlib.font_manager  # noqa: F401
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'experiments' / 'notebooks').glob('*.ipynb'))
EXECUTED = ROOT / 'build' / 'notebooks'

# Warnings are errors, as in all tests, but for those of the kernel itself.
STRICT = """
import warnings
warnings.simplefilter('error')
warnings.filterwarnings('default', module='ipykernel')
"""


def outputs(notebook, kind):
  return [
    output
    for cell in notebook.cells
    for output in cell.get('outputs', ())
    if output.output_type == kind
  ]


def test_the_notebooks_are_there():
  names = {path.stem for path in NOTEBOOKS}
  assert names >= {
    'quickstart',
    'compose_transforms',
    'own_training_loop',
    'read_a_run',
  }


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_without_outputs(path):
  raw = json.loads(path.read_text('utf-8'))
  assert (raw['nbformat'], raw['nbformat_minor']) >= (4, 5)  # cells have ids
  nbformat.validate(raw)
  for cell in raw['cells']:
    assert cell['metadata'] == {}, cell['id']
    if cell['cell_type'] == 'code':
      assert cell['outputs'] == [], cell['id']
      assert cell['execution_count'] is None, cell['id']


@pytest.mark.filterwarnings('ignore')  # of the client's, not of the notebook's
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_what_it_asserts_holds(path, tmp_path):
  notebook = nbformat.read(path, 4)
  notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT, id='strict'))
  client = nbclient.NotebookClient(
    notebook,
    timeout=300,
    kernel_name='python3',
    resources={'metadata': {'path': tmp_path}},
  )
  try:
    client.execute(env=os.environ | {'PYTHONPATH': str(ROOT)})
  finally:
    EXECUTED.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, EXECUTED / path.name)
  drawn = outputs(notebook, 'display_data') + outputs(
    notebook, 'execute_result'
  )
  assert drawn and all('image/png' in output.data for output in drawn)
  said = outputs(notebook, 'stream')
  assert [x.text for x in said if x.name == 'stderr'] == []
