"""The explorer in a headless browser, and the answers of its server."""

import asyncio
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from aiohttp.test_utils import TestServer
from conftest import composed
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from vae_lightning.analysis.explorer import make_application, normalize_drawing
from vae_lightning.runs.loading import open_run
from vae_lightning.training.train import train

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, trained with the words of an indirect parameter."""
    limits = ["trainer.max_epochs=1", "trainer.limit_train_batches=150", "trainer.limit_val_batches=1"]
    words = ["model.latent_dim=3", "model.backbone.hidden=[64]", "figures.every=0", *limits]
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(composed(*words, *getattr(request, "param", []), "trainer.limit_test_batches=1"), directory)
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


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1100"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def figure(browser: webdriver.Chrome, name: str) -> str:
    return str(browser.execute_script(f"return document.getElementById('{name}').toDataURL()"))


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
def test_drag_hover_and_draw_in_a_browser(served: str, browser: webdriver.Chrome) -> None:
    browser.get(served)
    wait = WebDriverWait(browser, 20)
    wait.until(lambda b: "latent_dim 3" in b.title)
    wait.until(lambda b: b.find_element(By.ID, "decoded").get_property("width") == 28)
    latent_map = browser.find_element(By.ID, "map")
    shown = figure(browser, "decoded")
    drag = ActionChains(browser, duration=50).move_to_element_with_offset(latent_map, 0, 0).click_and_hold()
    drag.perform()
    for _ in range(3):
        ActionChains(browser, duration=50).move_by_offset(60, 30).perform()
        wait.until(lambda b, last=shown: figure(b, "decoded") != last)  # the digit changes each time
        time.sleep(0.3)  # until the last position of the drag has been decoded
        shown = figure(browser, "decoded")
    ActionChains(browser).release().perform()

    before = figure(browser, "original")
    place = browser.execute_script("return toPixel(projected.find(([x, y]) => Math.abs(x) < 1 && Math.abs(y) < 1))")
    size = latent_map.size["width"] / 560
    offset = [round((value - 280) * size) for value in place]
    ActionChains(browser).move_to_element_with_offset(latent_map, *offset).perform()
    wait.until(lambda b: figure(b, "original") != before)
    assert figure(browser, "reconstruction") != before

    slider = browser.find_element(By.CSS_SELECTOR, "#sliders input")
    before = figure(browser, "decoded")
    ActionChains(browser).move_to_element(slider).click_and_hold().move_by_offset(40, 0).release().perform()
    wait.until(lambda b: figure(b, "decoded") != before)

    paper = browser.find_element(By.ID, "draw")
    strokes = ActionChains(browser, duration=50).move_to_element_with_offset(paper, 0, -70).click_and_hold()
    strokes.move_by_offset(0, 70).move_by_offset(0, 70).release().perform()
    wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#nearest figure")) == 5)
    assert browser.execute_script("return mark.length") == 3
    time.sleep(0.5)
    assert figure(browser, "seen") != figure(browser, "drawn")

    browser.execute_script("setBasis('principal')")
    assert browser.find_element(By.CSS_SELECTOR, "#across option").text == "direction 1"
    time.sleep(0.5)
    assert browser.find_element(By.ID, "problem").text == ""
    problems = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert problems == []


@pytest.mark.proof
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
@pytest.mark.parametrize("trained", [["model.conditional=true"]], indirect=True)
def test_a_class_is_chosen_in_a_browser(served: str, browser: webdriver.Chrome) -> None:
    browser.get(served)
    wait = WebDriverWait(browser, 20)
    wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#classes button")) == 10)
    buttons = browser.find_elements(By.CSS_SELECTOR, "#classes button")
    wait.until(lambda b: b.find_element(By.ID, "decoded").get_property("width") == 28)
    assert [button.text for button in buttons] == [str(label) for label in range(10)]
    assert buttons[0].get_attribute("aria-pressed") == "true"
    drawn = {figure(browser, "decoded")}
    for button in buttons[1:4]:
        button.click()
        wait.until(lambda b: figure(b, "decoded") not in drawn)  # the same z, another digit
        assert button.get_attribute("aria-pressed") == "true"
        drawn.add(figure(browser, "decoded"))
    assert browser.find_element(By.ID, "problem").text == ""


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
    for path, body, line in (
        ("/decode", '{"z": [0, 0]}', b"z: should be a list of 3 numbers"),
        ("/encode", '{"image": [1, 2]}', b"image: should be a list of 784 numbers"),
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
