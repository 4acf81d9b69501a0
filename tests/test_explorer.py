"""The explorer in a headless browser, on a wide screen and on a phone, and the answers of its server."""

import asyncio
import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from aiohttp.test_utils import TestServer
from conftest import DATA, composed
from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from vae_lightning.analysis.axes import latent_axes
from vae_lightning.analysis.explorer import make_application, normalize_drawing
from vae_lightning.analysis.generation import codes_and_kl
from vae_lightning.data.torchvision_sets import MNISTDataModule
from vae_lightning.runs.loading import open_run
from vae_lightning.training.train import train

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
WIDE, PHONE = (1400, 1000), (390, 844)


class Coloured(MNISTDataModule):
    """Digits in colours of their own, of 28×20 pixels: 1,000 to train on, 500 for the test."""

    class_names = "zero one two three four five six seven eight nine".split()

    def load(self):
        (train, labels), (test, test_labels) = super().load()
        return (coloured(train[:1_000]), labels[:1_000]), (coloured(test[:500]), test_labels[:500])


def coloured(images: torch.Tensor) -> torch.Tensor:
    ink, paper = torch.rand(2, len(images), 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return (255 * torch.lerp(0.4 * paper, 0.5 + 0.5 * ink, images[..., 4:24].float() / 255)).to(torch.uint8)


# The runs that the page is tried on: their words, and how many latent dimensions they have.
RUNS = {
    "two": (["model.latent_dim=2", "model.backbone.hidden=[64]"], 2),
    "many": (["model.latent_dim=200", "model.backbone.hidden=[64]"], 200),
    "conditional": (["model.latent_dim=3", "model.backbone.hidden=[64]", "model.conditional=true"], 3),
    "colour": (
        [
            *("data._target_=test_explorer.Coloured", f"data.root={DATA}", "data.val_size=100", "data.batch_size=20"),
            *("model/backbone=residual_conv", "model.backbone.channels=[8,8]"),
            *("model.backbone.groups=2", "model.backbone.spatial=true", "model.latent_dim=280"),
            "model/likelihood=discretized_logistic",
        ],
        280,
    ),
}


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, trained with the words of an indirect parameter."""
    limits = ["trainer.max_epochs=1", "trainer.limit_train_batches=150", "trainer.limit_val_batches=1"]
    limits += ["trainer.limit_test_batches=1", "figures.every=0", "figures.embedded=0"]
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(
        composed(*getattr(request, "param", ["model.latent_dim=3", "model.backbone.hidden=[64]"]), *limits), directory
    )
    return directory


@pytest.fixture(scope="module")
def served(trained: Path) -> Iterator[str]:
    """Serve the run from a thread; yield the address."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    server = TestServer(make_application(open_run(trained, "cpu"), "127.0.0.1"))
    asyncio.run_coroutine_threadsafe(server.start_server(), loop).result()
    yield str(server.make_url("")).rstrip("/")
    asyncio.run_coroutine_threadsafe(server.close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1100"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def visit(browser: webdriver.Chrome, address: str, size: tuple[int, int], dark: bool = False) -> WebDriverWait:
    """Open the page on a screen of that size, which is a phone's if it is narrow, and wait for its first picture."""
    phone = size == PHONE
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1 + phone, "mobile": phone}
    browser.get("about:blank")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get_log("browser")
    browser.get(address)
    wait = WebDriverWait(browser, 20)
    blank = browser.execute_script("return document.createElement('canvas').toDataURL()")
    wait.until(lambda b: b.execute_script("return points.length > 0") and figure(b, "decoded") != blank)
    return wait


def figure(browser: webdriver.Chrome, name: str) -> str:
    return str(browser.execute_script(f"return document.getElementById('{name}').toDataURL()"))


def text(browser: webdriver.Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).text


def check_page(browser: webdriver.Chrome) -> None:
    """Nothing is wider than the screen, nothing is cut off, and nothing went wrong."""
    # Not innerWidth, which grows on a phone that zooms out to show a page that is too wide.
    needed, width = browser.execute_script(
        "const {scrollWidth, clientWidth} = document.documentElement; return [scrollWidth, clientWidth]"
    )
    assert needed <= width
    cut = """
    const root = document.documentElement;
    const texts = document.querySelectorAll("h1, h2, p, button, figcaption, select, label, output");
    const isCut = e => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > root.clientWidth;
    return [...texts].filter(e => e.offsetParent && isCut(e)).map(e => e.outerHTML.slice(0, 100));
    """
    assert browser.execute_script(cut) == []
    assert text(browser, "problem") == ""
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def place_of_a_point(browser: webdriver.Chrome) -> list[float]:
    """Return where a test image is on the map, in pixels from the middle of the map."""
    script = "return toPixel(points.find(([x, up]) => Math.abs(x) < 1 && Math.abs(up) < 1)).map(v => v - side / 2)"
    return [round(value) for value in browser.execute_script(script)]


@needs_browser
def test_drag_hover_and_draw_in_a_browser(served: str, browser: webdriver.Chrome) -> None:
    wait = visit(browser, served, WIDE)
    assert "latent_dim 3" in browser.title
    assert browser.execute_script("return [$('decoded').width, $('decoded').height]") == [28, 28]
    latent_map = browser.find_element(By.ID, "map")
    shown = figure(browser, "decoded")
    ActionChains(browser, duration=50).move_to_element_with_offset(latent_map, 0, 0).click_and_hold().perform()
    for _ in range(3):
        ActionChains(browser, duration=50).move_by_offset(60, 30).perform()
        wait.until(lambda b, last=shown: figure(b, "decoded") != last)  # the digit changes each time
        time.sleep(0.3)  # until the last position of the drag has been decoded
        shown = figure(browser, "decoded")
    ActionChains(browser).release().perform()

    before = figure(browser, "original")
    offset = place_of_a_point(browser)
    ActionChains(browser).move_to_element_with_offset(latent_map, *offset).perform()
    wait.until(lambda b: figure(b, "original") != before)
    assert figure(browser, "reconstruction") != before
    wait.until(lambda b: figure(b, "decoded") != shown)  # what is under the cursor, until the mouse leaves the map
    ActionChains(browser).move_to_element(browser.find_element(By.ID, "name")).perform()
    wait.until(lambda b: figure(b, "decoded") == shown)

    slider = browser.find_element(By.CSS_SELECTOR, "#sliders input")
    ActionChains(browser).move_to_element(slider).click_and_hold().move_by_offset(40, 0).release().perform()
    wait.until(lambda b: figure(b, "decoded") != shown)

    paper = browser.find_element(By.ID, "paper")
    strokes = ActionChains(browser, duration=50).move_to_element_with_offset(paper, 0, -70).click_and_hold()
    strokes.move_by_offset(0, 70).move_by_offset(0, 70).release().perform()
    wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#nearest figure")) == 5)
    assert browser.execute_script("return codes.drawing.length") == 3
    time.sleep(0.5)
    assert figure(browser, "seen") != figure(browser, "rebuilt")

    browser.execute_script("setBasis('principal components')")
    assert browser.find_element(By.CSS_SELECTOR, "#across option").text == "PC 1"
    time.sleep(0.5)
    check_page(browser)


@needs_browser
def test_a_link_restores_the_state(served: str, browser: webdriver.Chrome) -> None:
    wait = visit(browser, served, WIDE)
    latent_map = browser.find_element(By.ID, "map")
    browser.find_element(By.ID, "interpolate").click()
    for offset in ((-100, -80), (90, 60)):
        ActionChains(browser).move_to_element_with_offset(latent_map, *offset).click().perform()
    strip = "return [...$('strip').children].map(button => button.firstChild.toDataURL())"
    wait.until(lambda b: len(set(b.execute_script(strip))) > 5)
    ActionChains(browser).move_to_element(browser.find_element(By.ID, "name")).perform()
    browser.find_element(By.TAG_NAME, "body").send_keys("np")  # the next test image, and the one before
    latent_map.send_keys(Keys.ARROW_LEFT, Keys.SHIFT + Keys.ARROW_UP)
    time.sleep(0.8)  # until the link is written
    decoded = "return [$('decoded'), ...document.querySelectorAll('#strip canvas')]"
    decoded += ".flatMap(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"
    before, images = np.array(browser.execute_script(decoded)), figure(browser, "original")
    shown = [text(browser, name) for name in ("where", "caption", "hint", "across", "sliders")]
    link = browser.current_url
    assert "&a=1:" in link
    assert browser.execute_script("return onMap(z)") != browser.execute_script("return onMap(ends[1])")

    visit(browser, link, WIDE)
    wait.until(lambda b: len(set(b.execute_script(strip))) > 5)
    time.sleep(0.5)
    assert np.abs(np.array(browser.execute_script(decoded)) - before).max() <= 2  # a link has three decimals
    assert figure(browser, "original") == images
    assert [text(browser, name) for name in ("where", "caption", "hint", "across", "sliders")] == shown
    visit(browser, f"{served}#axes=no&across=x&up=99&z=9:1,a,2:b&y=77&image=-1&a=1:1e999", WIDE)  # not a link of ours
    check_page(browser)


@needs_browser
def test_a_phone(served: str, browser: webdriver.Chrome) -> None:
    wait = visit(browser, served, PHONE, dark=True)
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(23, 23, 26)"
    small = "return [...document.querySelectorAll('button, select, input[type=range], label')]"
    small += ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 40).map(e => e.id || e.outerHTML)"
    assert browser.execute_script(small) == []
    check_page(browser)

    box = browser.find_element(By.ID, "map").rect
    shown, image = figure(browser, "decoded"), figure(browser, "original")
    x, y = (
        box[name] + box[length] / 2 + offset
        for name, length, offset in zip("xy", ("width", "height"), place_of_a_point(browser), strict=True)
    )
    for kind, points in (("Start", [(x, y)]), ("Move", [(x + 60, y + 30)]), ("Move", [(x, y)]), ("End", [])):
        touches = [{"x": a, "y": b} for a, b in points]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": touches})
    wait.until(lambda b: figure(b, "decoded") != shown)
    wait.until(lambda b: figure(b, "original") != image)
    assert browser.execute_script("return scrollY") == 0  # the map moved its point and not the page

    browser.execute_script("$('paper').scrollIntoView({block: 'center'})")
    box = browser.execute_script("const {x, y} = paper.getBoundingClientRect(); return [x, y]")
    for kind, points in (("Start", [(80, 80)]), ("Move", [(120, 160)]), ("End", [])):
        touches = [{"x": box[0] + a, "y": box[1] + b} for a, b in points]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": touches})
    wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#nearest figure")) == 5)
    assert browser.execute_script("return $('pictures').getBoundingClientRect().top") == 0  # stays in sight
    check_page(browser)


@pytest.mark.proof
@needs_browser
@pytest.mark.parametrize(
    ("trained", "name"), [(words, name) for name, (words, _) in RUNS.items()], indirect=["trained"], ids=RUNS
)
def test_four_runs_on_both_screens(served: str, name: str, browser: webdriver.Chrome, tmp_path: Path) -> None:
    latent_dim = RUNS[name][1]
    state = json.loads(request(f"{served}/state")[1])
    kl = state["axes"]["dimensions"]["values"]
    assert len(kl) == latent_dim
    assert name == "two" or kl == sorted(kl, reverse=True)
    for size, dark in ((WIDE, False), (PHONE, True)):
        wait = visit(browser, served, size, dark)
        height, width = state["shape"][1:]
        assert browser.execute_script("return [$('decoded').width, $('decoded').height]") == [width, height]
        assert len(browser.find_elements(By.CSS_SELECTOR, "#sliders label")) == min(20, latent_dim)
        if latent_dim > 20:
            browser.execute_script("$('more').click()")
            assert len(browser.find_elements(By.CSS_SELECTOR, "#sliders label")) == 40
            assert text(browser, "more") == f"show more ({latent_dim - 40})"
        browser.execute_script("showImage(2); ends = [moved(z, 0, -2), moved(z, 0, 2)]; setInterpolating(true)")
        wait.until(lambda b: b.find_element(By.ID, "to-image").is_enabled())
        label = state["names"][state["labels"][2]]
        assert text(browser, "caption") == f"test image 2, label {label}"
        assert label in text(browser, "legend").split()
        browser.execute_script("$('to-image').click()")
        wait.until(lambda b: name == "conditional" or figure(b, "decoded") == figure(b, "reconstruction"))
        open_image(browser, tmp_path / "photo.png", width + 40, height)
        wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#nearest figure")) == 5)
        red = browser.execute_script("return [...$('seen').getContext('2d').getImageData(0, 0, 1, 1).data]")
        assert red == [255, 0, 0, 255] if name == "colour" else red[0] == red[1] == red[2]
        time.sleep(0.5)
        check_page(browser)
        if name == "conditional":
            choose_classes(browser, wait)

    assert browser.execute_async_script(MILLISECONDS) < 20


# From the cursor to its picture, the least of many, since a busy machine takes longer.
MILLISECONDS = """
const done = arguments[0], times = [];
const decoded = async i => {
  const start = performance.now();
  show($("decoded"), await answer("/decode", {z: placed([i / 30 - 1, 0]), y}));
  times.push(performance.now() - start);
};
(async () => {
  for (let i = 0; i < 60; i++) await decoded(i);
  done(Math.min(...times));
})();
"""


def open_image(browser: webdriver.Chrome, file: Path, width: int, height: int) -> None:
    """Open an image that is red, with a white stripe, and wider than those of the model."""
    pixels = np.full((height, width, 3), (255, 0, 0), np.uint8)
    pixels[height // 2 :: 3] = 255
    Image.fromarray(pixels).save(file)
    browser.execute_script("$('normalize').checked = false")
    browser.find_element(By.ID, "file").send_keys(str(file))


def choose_classes(browser: webdriver.Chrome, wait: WebDriverWait) -> None:
    """The same z is another digit."""
    buttons = browser.find_elements(By.CSS_SELECTOR, "#classes button")
    assert [button.text for button in buttons] == [str(label) for label in range(10)]
    assert buttons[0].get_attribute("aria-pressed") == "true"
    drawn = {figure(browser, "decoded")}
    for button in buttons[1:4]:
        browser.execute_script("arguments[0].click()", button)
        wait.until(lambda b: figure(b, "decoded") not in drawn)
        assert button.get_attribute("aria-pressed") == "true"
        drawn.add(figure(browser, "decoded"))


def request(url: str, body: str | None = None, **headers: str) -> tuple[int, bytes]:
    asked = urllib.request.Request(url, body.encode() if body else None, headers)
    try:
        with urllib.request.urlopen(asked) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_invalid_requests_get_one_line_and_other_origins_are_refused(
    served: str, trained: Path, script, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert request(f"{served}/")[0] == 200
    status, image = request(f"{served}/decode", '{"z": [0, 0, 0]}')
    assert (status, len(image)) == (200, 784)
    assert len(request(f"{served}/decode", '{"z": [[0, 0, 0], [1, 0, 0]]}')[1]) == 2 * 784
    for path, body, line in (
        ("/decode", '{"z": [0, 0]}', b"latents of shape (2,): should end in latent_dim=3"),
        ("/decode", '{"z": [0, 0, NaN]}', b"latents: some are NaN or infinite"),
        ("/decode", '{"z": ["a"]}', b"latents: list is not an array of real numbers"),
        ("/decode", '{"z": 1}', b"/decode: should be JSON, an object with a list as z"),
        ("/decode", "[]", b"/decode: should be JSON, an object with a list as z"),
        ("/decode", "{", b"/decode: should be JSON, an object with a list as z"),
        ("/encode", '{"image": [1, 2]}', b"image: should be a list of 784 numbers"),
        ("/points/dimensions/0/3", None, b"/points/dimensions/0/3: should be one of dimensions, principal components"),
        ("/points/no/0/1", None, b"/points/no/0/1: should be one of dimensions, principal components"),
        ("/image/10000", None, b"10000: should be an index from 0 to 9999"),
    ):
        status, text = request(f"{served}{path}", body)
        assert (status, text.count(b"\n")) == (400, 0), path
        assert text.startswith(line)
    for other_host in ("evil.example:80", "evil.example", "127.0.0.1.evil.example"):
        assert request(f"{served}/state", host=other_host)[0] == 403
    assert request(f"{served}/decode", '{"z": [0, 0, 0]}', origin="http://evil.example")[0] == 403
    assert request(f"{served}/decode", '{"z": [0, 0, 0]}', origin=served)[0] == 200

    port = served.rpartition(":")[2]
    for words, line in (
        ([trained, "--port", port], "cannot listen there"),
        (["no"], "not a run directory"),
        ([trained, "--port", "99999"], "less than or equal to 65535"),
    ):
        refused = script("vae", "explore", *words)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert line in refused.err
    monkeypatch.setattr("aiohttp.web.run_app", lambda *_, print, **__: print())
    assert script("vae", "explore", trained, "--port", "8001").out == "http://127.0.0.1:8001    (stop with Ctrl-C)\n"


def test_axes_are_orthogonal_and_have_a_length(trained: Path) -> None:
    run = open_run(trained, "cpu")
    codes, kl = codes_and_kl(run)
    assert kl is not None
    tested = json.loads((trained / "metrics.json").read_text())["test/kl"]  # of the first batch
    assert kl.sum().item() == pytest.approx(tested, rel=0.2)
    for axes in latent_axes(run, codes, kl).values():
        u = torch.randn(5, 3)
        assert axes.coordinates(axes.center + u @ axes.axes, [2, 0]) == pytest.approx(u[:, [2, 0]], abs=1e-4)
        assert axes.values == sorted(axes.values, reverse=True)
    collapsed = latent_axes(run, torch.zeros(50, 3), None)
    text = json.dumps([axes.described() for axes in collapsed.values()])
    assert "NaN" not in text
    assert all(any(axis["by"]) for axes in json.loads(text) for axis in axes["axes"])


def test_a_drawing_is_scaled_and_centered_as_mnist_digits_are() -> None:
    drawing = torch.zeros(1, 28, 28)
    drawing[:, 1:11, 2:6] = 1
    placed = normalize_drawing(drawing)
    ink = (placed[0] > 0.1).nonzero()
    assert (ink.amax(dim=0) - ink.amin(dim=0) + 1).tolist() == [20, 8]
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    assert (placed[0] * rows).sum() / placed.sum() == pytest.approx(14, abs=0.5)
    assert (placed[0] * columns).sum() / placed.sum() == pytest.approx(14, abs=0.5)
    assert torch.equal(normalize_drawing(torch.zeros(1, 28, 28)), torch.zeros(1, 28, 28))
