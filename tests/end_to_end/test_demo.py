"""The page that draws: its own requests and others', in a browser too where there is one."""

import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from launchers.demo import checked
from mdit.checkpoint.snapshot import load_snapshot
from mdit.config import UserError
from mdit.eval.samples import generate, read_about
from tests.processes import start_forked
from tests.towers import save_clip
from tests.training import REPOSITORY, launch
from tests.unit.test_publish import snapshot_of_released

GOOD = dict(prompt="a red apple", count=2, guidance=3.0, steps=2, seed=5)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": "a" * 10_000}, "the prompt has 10,000 characters; 2,000 are the most"),
        ({"steps": 0}, "steps is 0; expected a whole number from 2 to 100"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"count": 1000}, "pictures is 1000"),
        ({"seed": None}, "seed is None"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance": float("nan")}, "guidance is nan; expected a number above 0"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_a_line(change, message):
    assert checked(**GOOD) == ("a red apple", 2, {"guidance": 3.0, "steps": 2, "seed": 5})
    with pytest.raises(UserError, match=message):
        checked(**GOOD | change)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """-> (address of a page, its snapshot, its log)"""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("demo")
    snapshot = snapshot_of_released(folder, save_clip)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--snapshot", str(snapshot), "--port", str(port)]
    (log := folder / "log").touch()
    process = start_forked(launch, str(REPOSITORY / "launchers/demo.py"), arguments, log=log)
    try:
        deadline = time.monotonic() + 200  # of a busy machine
        while "draws; Ctrl-C ends it" not in log.read_text():
            assert process.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", snapshot, log
    finally:
        process.terminate()
        process.join(30)


def test_two_requests_at_once_draw_the_launchers_pictures(served):
    from gradio_client import Client

    address, snapshot, log = served

    def draw(seed):
        client = Client(address, verbose=False)
        pictures, _ = client.predict("a red apple", 2, 3.0, 2, seed, api_name="/draw")
        return [read_about(each["image"]) for each in pictures]

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(draw, (5, 6)))
    assert len(generate(load_snapshot(snapshot), ["a red apple"] * 2, guidance=3.0, steps=2, seed=5)) == 2
    for seed, abouts in zip((5, 6), found, strict=True):
        assert [about["prompt"] for about in abouts] == ["a red apple"] * 2
        assert f'"seed": {seed}, "number": 1' in abouts[1]["mdit"]
    assert "Traceback" not in log.read_text()


@contextmanager
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium, no chromedriver: make test installs Debian's")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, "--window-size=1280,900"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def test_the_page_in_a_browser(served):
    address, _, log = served
    with browser() as page:
        page.get(address)
        until(lambda: page.find_elements("css selector", "textarea"))

        def draw(prompt):
            """As typed; a long one at once, as pasted."""
            (box,) = page.find_elements("css selector", "textarea")
            said = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
            page.execute_script(said, box, prompt)
            next(button for button in page.find_elements("tag name", "button") if button.text == "Draw").click()

        def pictures():
            return page.find_elements("css selector", ".grid-container img")

        def text():
            return page.find_element("tag name", "body").text

        draw("a frog, green")
        until(lambda: len(pictures()) == 8)  # four, and four in the history
        for prompt, message in (("", "the prompt is empty"), ("a" * 10_000, "the prompt has 10,000 characters")):
            draw(prompt)
            until(lambda message=message: message in text())
        assert len(pictures()) == 8 and "Traceback" not in text() + log.read_text()


def until(done, seconds=60):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.2)
