"""A headless browser for tests of pages."""

from collections.abc import Iterator
import contextlib
import shutil

import pytest

_NAMES = (
  'chromium-headless-shell',
  'chrome-headless-shell',
  'chromium',
  'chromium-browser',
  'google-chrome',
)


@contextlib.contextmanager
def launch() -> Iterator:
  """A Chromium, by playwright; skips the test where there is none."""
  playwright = pytest.importorskip('playwright.sync_api')
  path = next(filter(None, map(shutil.which, _NAMES)), None)
  if path is None:
    pytest.skip(f'no browser: none of {", ".join(_NAMES)} is installed')
  with playwright.sync_playwright() as engine:
    # Without its sandbox, which root, as which CI runs, cannot have.
    chromium = engine.chromium.launch(
      executable_path=path, args=['--no-sandbox']
    )
    yield chromium
    chromium.close()
