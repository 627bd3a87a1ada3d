"""`mustdrop app` in a real browser, end to end; skipped where gradio or Chromium is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from PIL import Image

import mustdrop
from mustdrop.app.requests import Limits
from mustdrop.app.session import Session
from support import browser

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "space"
MISSING = browser.missing() or (
    "" if importlib.util.find_spec("gradio") else "gradio is not installed: nox -s app brings it"
)
real = pytest.mark.skipif(bool(MISSING), reason=MISSING or "all is there")
# What gradio itself asks the network for, and what the browser says of it here, where no name is looked up.
GRADIOS_OWN = re.compile(
    r"cdnjs\.cloudflare\.com|fonts\.g\w+\.com|huggingface\.co|manifest\.json|favicon|iframe-resizer"
)
WAIT = 240  # seconds, on a machine that is busy with other tests


@pytest.fixture(scope="module")
def address():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from mustdrop.app import page

    session = Session(limits=Limits(picture_bytes=300_000))
    blocks = page.build(session)
    page.launch(blocks, session, server_name="127.0.0.1", server_port=free(), prevent_thread_lock=True, quiet=True)
    yield blocks.local_url
    blocks.close(verbose=False)


@pytest.fixture
def driver(address, tmp_path):
    made = browser.start(tmp_path / "profile")
    made.set_window_size(1280, 1000)
    made.get(address)
    yield made
    made.quit()


def free():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def until(ask, what):
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        found = ask()
        if found:
            return found
        time.sleep(0.2)
    pytest.fail(f"{what} did not come in {WAIT} s")


def element(driver, selector):
    return until(lambda: driver.find_elements("css selector", selector), selector)[0]


def click(driver, selector):
    """Click once the page stands still: components are drawn one after another, and push the others down."""
    from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException

    def clicked():
        try:
            element(driver, selector).click()
        except (ElementClickInterceptedException, StaleElementReferenceException):
            return False
        return True

    until(clicked, f"a click on {selector}")


def ask(driver):
    driver.execute_script("document.querySelectorAll('#outcome .answers').forEach((one) => one.remove())")
    click(driver, "#ask")


def answers(driver):
    """[(name, answer)] of the page, once they have come and stay; components are drawn more than once."""
    read = (
        "return [...document.querySelectorAll('#outcome .answers section')].map("
        "(one) => [one.querySelector('h3').textContent, one.querySelector('p').textContent])"
    )
    found = until(lambda: driver.execute_script(read), "an answer")
    until(lambda: not driver.find_elements("css selector", "#outcome .generating, #outcome .pending"), "the end")
    time.sleep(1)
    return driver.execute_script(read) or found


MOVE = """
const layer = document.getElementById("layer");
const said = () => [...document.querySelectorAll("canvas")].map((one) => one.ariaLabel).join();
if (!layer || !said()) return null;
const before = said();
layer.value = layer.min;
layer.dispatchEvent(new Event("input", {bubbles: true}));
return [before, said()];
"""


def moved(driver):
    """What the page inside says before and after its slider moves; None while it is drawn anew."""
    from selenium.common.exceptions import WebDriverException

    driver.switch_to.default_content()
    try:
        driver.switch_to.frame(driver.find_element("css selector", "#outcome iframe"))
        return driver.execute_script(MOVE)
    except WebDriverException:
        return None
    finally:
        driver.switch_to.default_content()


@real
def test_a_scene_is_asked_about_and_the_page_of_what_is_kept_works_inside(driver):
    ask(driver)
    (first, whole), (second, pruned) = answers(driver)
    assert first == "all tokens"
    assert second.startswith("mustdrop, keep=")
    assert whole
    assert pruned
    table = driver.execute_script("return document.querySelector('#outcome .costs').textContent")
    assert "576.0 of 576" in table
    assert re.search(r"14[34]\.\d of 576", table)
    before, after = until(lambda: moved(driver), "the page of what is kept")
    assert "tokens" in before
    assert after != before
    assert [said for said in browser.complaints(driver) if not GRADIOS_OWN.search(said)] == []


@real
def test_another_scene_brings_its_question(driver):
    words = element(driver, "#question textarea, #question input")
    before = words.get_attribute("value")
    source = "return [...document.querySelectorAll('#picture img')].map((one) => one.src).join()"
    picture = until(lambda: driver.execute_script(source), "the first picture")
    for _ in range(3):  # a question may come twice
        click(driver, "#another")
        until(lambda seen=picture: driver.execute_script(source) not in (seen, ""), "another picture")
        picture = driver.execute_script(source)
        if words.get_attribute("value") != before:
            break
    assert words.get_attribute("value") != before
    ask(driver)
    assert len(answers(driver)) == 2


def film(path):
    """A clip of four seconds: a square moves from left to right."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
        for i in range(16):
            picture = Image.new("RGB", (192, 128), (20, 20, 40))
            picture.paste((230, 40, 40), (10 + 8 * i, 40, 50 + 8 * i, 80))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def choose(driver, selector, text):
    """Type into a list of choices, and take the first that fits."""
    from selenium.webdriver.common.keys import Keys

    words = element(driver, f"{selector} input")
    words.click()
    words.send_keys(Keys.CONTROL, "a")
    words.send_keys(text)
    until(lambda: driver.find_elements("css selector", f"{selector} ul[role=listbox] li"), text)
    words.send_keys(Keys.ENTER)
    words.send_keys(Keys.ESCAPE)


@real
def test_a_video_is_asked_about_under_two_methods_and_another_budget(driver, tmp_path):
    from selenium.webdriver.common.keys import Keys

    film(tmp_path / "film.mp4")
    until(lambda: driver.find_elements("xpath", "//button[@role='tab' and contains(., 'Video')]"), "the tab")[0].click()
    element(driver, "#video input[type=file]").send_keys(str(tmp_path / "film.mp4"))
    until(lambda: driver.find_elements("css selector", "#video video"), "the upload")
    choose(driver, "#model", "pages")
    choose(driver, "#methods", "vidcom2")
    number = element(driver, "#budget input[type=number]")
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("50", Keys.TAB)
    ask(driver)
    names = [name for name, _ in answers(driver)]
    assert names == ["all tokens", "mustdrop, keep=50%", "vidcom2, keep=50%"]
    read = "return [...document.querySelectorAll('#outcome .costs td:nth-child(2)')].map((one) => one.textContent)"
    cells = [re.fullmatch(r"([\d.]+) of (\d+)", text).groups() for text in driver.execute_script(read)]
    shares = [float(tokens) / int(total) for tokens, total in cells]
    assert shares == pytest.approx([1, 0.5, 0.5], abs=0.02)
    before, _ = until(lambda: moved(driver), "the page of what is kept")
    assert all(f"video, frame {number}:" in before for number in (1, 3, 5, 7))  # two frames make a token


@real
@pytest.mark.parametrize("kind", ["broken", "heavy"])
def test_a_bad_upload_is_one_message_and_the_page_goes_on(kind, driver, tmp_path):
    path = tmp_path / f"{kind}.png"
    if kind == "broken":
        path.write_bytes(b"\x89PNG\r\n\x1a\nthis is no picture")
    else:
        Image.effect_noise((900, 900), 90).convert("RGB").save(path)
    click(
        driver, "#picture [aria-label='Remove Image'], #picture [title='Remove Image'], #picture [aria-label='Clear']"
    )
    element(driver, "#picture input[type=file]").send_keys(str(path))
    until(lambda: driver.find_elements("css selector", "#picture img"), "the upload")
    click(driver, "#ask")
    read = "return [...document.querySelectorAll('.toast-body')].map((one) => one.innerText).filter(Boolean)"
    (said,) = until(lambda: driver.execute_script(read), "the message")
    assert ("cannot decode" if kind == "broken" else "are the most") in said
    assert str(tmp_path) not in said
    assert "Traceback" not in driver.page_source
    click(driver, "#another")
    until(lambda: driver.find_elements("css selector", "#picture img"), "another picture")
    time.sleep(1)
    ask(driver)
    assert answers(driver)


@real
def test_only_this_machine_is_let_in(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    assert urllib.request.urlopen(address, timeout=30).status == 200
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=5)  # it would answer on every address


@real
def test_it_fits_a_phone(driver):
    driver.set_window_size(400, 900)
    ask(driver)
    answers(driver)
    wide = driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed: nox -s app brings it")
def test_the_folder_of_a_space_runs_as_it_is(tmp_path):
    port = free()
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, "app.py"], cwd=SPACE, env=os.environ | settings, stdout=log, stderr=log
        )
    try:
        address = f"http://127.0.0.1:{port}/"

        def there():
            assert running.poll() is None, (tmp_path / "log").read_text()
            try:
                return urllib.request.urlopen(address, timeout=5).status == 200
            except OSError:
                return False

        until(there, "the page of the Space")
    finally:
        running.terminate()
        running.wait(30)


def test_the_header_of_the_space_is_what_spaces_read():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---\n")[1])
    assert (header["sdk"], header["app_file"], header["license"]) == ("gradio", "app.py", "apache-2.0")
    assert (SPACE / header["app_file"]).is_file()
    assert int(header["sdk_version"].partition(".")[0]) >= 6
    assert len(header["short_description"]) <= 60  # as the hub wants it
    needs = (SPACE / "requirements.txt").read_text(encoding="utf-8")
    assert f"mustdrop[app]=={mustdrop.__version__}\n" in needs
