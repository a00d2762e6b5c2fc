"""The report and the demo in Chromium: clicks through them, light and dark, on a desktop and a phone."""

import shutil
import threading

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.helpers import digits_run

sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
uvicorn = pytest.importorskip('uvicorn', reason='uvicorn is not installed')

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed')

DESKTOP, PHONE = {'width': 1280, 'height': 900}, {'width': 390, 'height': 844}


@pytest.fixture(scope='module')
def browser():
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run']
    )
    yield browser
    browser.close()


@pytest.fixture(params=[(DESKTOP, 'light'), (PHONE, 'dark')], ids=['desktop-light', 'phone-dark'])
def page(browser, request):
  """A tab that must not log errors or failed requests."""
  viewport, scheme = request.param
  context = browser.new_context(viewport=viewport, color_scheme=scheme)
  page = context.new_page()
  wrong = []
  page.on('pageerror', lambda error: wrong.append(str(error)))
  page.on('console', lambda message: wrong.append(message.text) if message.type == 'error' else None)
  page.on('requestfailed', lambda failed: wrong.append(failed.url))
  yield page
  context.close()
  assert [one for one in wrong if '422' not in one] == []


def assert_fits(page):
  """The page does not scroll horizontally."""
  assert page.evaluate('document.documentElement.scrollWidth <= window.innerWidth')


def luminance(page):
  color = page.evaluate('getComputedStyle(document.body).backgroundColor')
  return sum(map(int, color[color.index('(') + 1 : -1].split(',')[:3])) / 3


def test_the_report(page, data_dir):
  page.goto((digits_run(data_dir) / 'report.html').as_uri())
  assert page.title() == 'digits-0'
  assert_fits(page)
  assert (luminance(page) > 128) == page.evaluate("matchMedia('(prefers-color-scheme: light)').matches")
  loaded = '[...document.images].every(image => image.complete && image.naturalWidth > 0)'
  assert page.evaluate(loaded)
  assert page.locator('.neighbours img').count() == 35
  for link in page.locator('nav a').all():
    link.click()
    target = page.locator(page.evaluate('location.hash'))
    assert target.count() == 1
    box = target.bounding_box()
    assert box is not None
    assert box['y'] < page.viewport_size['height']
  summary = page.locator('summary', has_text='Full configuration')
  key = page.locator('td', has_text='optimizer.learning_rate').first
  assert not key.is_visible()
  summary.click()
  assert key.is_visible()
  assert_fits(page)
  curve = page.locator('svg path[style*="--series-0"]').first
  assert curve.evaluate('line => getComputedStyle(line).stroke') not in ('none', '')
  page.emulate_media(media='print')
  assert not page.locator('nav').first.is_visible()


@pytest.fixture(scope='module')
def address(data_dir):
  from alexnet_flax.pretrained import load_pretrained
  from alexnet_flax.viz.demo import application

  network = load_pretrained(str(digits_run(data_dir)))
  config = uvicorn.Config(application(network), port=0, log_level='warning')
  server = uvicorn.Server(config)
  server.config.load()
  thread = threading.Thread(target=server.run)
  thread.start()
  while not server.started:
    thread.join(0.05)
  yield f'http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}'
  server.should_exit = True
  thread.join()


def test_the_demo(page, address, tmp_path):
  photo = tmp_path / 'photo.jpg'
  Image.fromarray(load_sample_images().images[1]).save(photo)
  (tmp_path / 'text.jpg').write_text('text')
  page.goto(address)
  assert_fits(page)
  page.set_input_files('#file', photo)
  page.wait_for_selector('.prediction .bar')
  assert page.locator('.prediction .bar').count() == 5
  assert_fits(page)
  details = page.locator('details', has_text='relu5')
  image = details.locator('img')
  assert not image.is_visible()
  details.locator('summary').click()
  assert image.is_visible()
  assert image.evaluate('image => image.naturalWidth') > 8
  page.set_input_files('#file', tmp_path / 'text.jpg')
  page.wait_for_selector('#prediction .error')
  assert 'Cannot read the image: not an image' in page.locator('.error').inner_text()
  # Dropped instead of chosen.
  page.evaluate(
    """async () => {
      const canvas = new OffscreenCanvas(80, 60);
      canvas.getContext('2d').fillRect(20, 10, 30, 30);
      const transfer = new DataTransfer();
      transfer.items.add(new File([await canvas.convertToBlob()], 'drawn.png', {type: 'image/png'}));
      const options = {dataTransfer: transfer, bubbles: true, cancelable: true};
      document.dispatchEvent(new DragEvent('drop', options));
    }"""
  )
  page.wait_for_selector('.prediction .bar')
  assert page.locator('.error').count() == 0


def test_a_stopped_server_is_reported(browser, address, tmp_path):
  context = browser.new_context()
  page = context.new_page()
  page.goto(address)
  context.set_offline(True)
  photo = tmp_path / 'photo.png'
  Image.new('RGB', (80, 80)).save(photo)
  page.set_input_files('#file', photo)
  page.wait_for_selector('.error')
  assert 'Is it still running?' in page.locator('.error').inner_text()
  context.close()
