"""The HTML report: what it says, that it stands alone, and how a real browser shows it."""

import base64
import html.parser
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
from jaxkit_experiments.report import find_runs, render, write_report
from jaxkit_experiments.runfolder import RunError
from jaxkit_experiments.runner import run_experiment
from rich.console import Console

from tests.experiments.tiny import Config, Tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, an unfinished one and a damaged one."""
    root = tmp_path_factory.mktemp("runs")
    quiet = Console(file=io.StringIO())
    run_experiment(Tiny(), Config(steps=6), root / "a-done", preset="cpu", console=quiet)
    for name in ("b-unfinished", "c-damaged"):
        shutil.copytree(root / "a-done", root / name)
        (root / name / "summary.json").unlink()
    shutil.rmtree(root / "b-unfinished/arms/curve")
    (root / "c-damaged/arms/curve/result.json").write_text("{")
    (root / "c-damaged/environment.json").write_text("{")
    return root


@pytest.fixture(scope="module")
def page(runs):
    return write_report(find_runs([runs]), runs / "out/report.html")


class Outline(html.parser.HTMLParser):
    """Checks that tags nest, and collects attributes that load or describe something."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.ids = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.seen.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.seen if name == tag]


def test_finds_folders_given_and_below_each_once(runs):
    done = runs / "a-done"
    assert [path.name for path in find_runs([runs])] == ["a-done", "b-unfinished", "c-damaged"]
    assert find_runs([done, runs])[0] == done
    assert len(find_runs([done, runs, done])) == 3


def test_shows_each_run_with_its_table_claims_and_plots(runs, page):
    text = page.read_text()
    summary = json.loads((runs / "a-done/summary.json").read_text())
    values = np.asarray(summary["arms"]["line"]["error"])
    assert f"{values.mean():.4g} <small>± {values.std(ddof=1):.2g}</small>" in text
    assert '<td class="paper">0.25</td>' in text
    assert "The paper &lt;drew&gt; with a ruler." in text
    for claim in summary["claims"]:
        assert claim["text"] in text
        assert f">{claim['status']}</span>" in text
    plot = (runs / "a-done/plots/curve-loss-train.png").read_bytes()
    assert base64.b64encode(plot).decode() in text
    assert "A line and a curve &lt;fitted&gt; to a sum" in text
    assert "weights of the line: (2, 2, 1)" in text
    assert "Unfinished: 1 of 2 arms are done" in text
    assert "arms/curve/result.json is corrupt" in text
    assert "environment.json is not valid JSON" in text


def test_stands_alone_and_is_accessible(page):
    text = page.read_text()
    outline = Outline(text)
    assert [tag for tag, _ in outline.seen if tag == "script"] == []
    assert all(image["src"].startswith("data:image/png;base64,") for image in outline.all("img"))
    assert all(image["alt"] for image in outline.all("img"))
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)""", text) == []
    assert "@import" not in text
    assert "url(" not in text
    assert outline.all("html")[0]["lang"] == "en"
    assert all(cell["scope"] in ("col", "row") for cell in outline.all("th"))
    targets = {attributes["id"] for attributes in outline.all("section")}
    assert {link["href"][1:] for link in outline.all("a")} == targets
    assert len(outline.all("h1")) == len(outline.all("main")) == 1


def test_numbers_that_are_not_finite_or_absent(runs, tmp_path):
    shutil.copytree(runs / "a-done", tmp_path / "odd")
    path = tmp_path / "odd/summary.json"
    summary = json.loads(path.read_text())
    summary["arms"]["line"]["error"] = ["NaN", "Infinity"]
    summary["arms"]["curve"] = {"bias": ["NaN", 1.5]}
    summary["plots"].append("plots/gone.png")
    path.write_text(json.dumps(summary))
    text = render([tmp_path / "odd"])
    assert "<td>inf</td>" in text
    assert "<td>–</td>" in text
    assert "<td>1.5</td>" in text
    assert "plots/gone.png is missing" in text


def test_a_page_that_cannot_be_written_is_named(runs, tmp_path):
    with pytest.raises(RunError, match="cannot be written: Is a directory"):
        write_report([runs / "a-done"], tmp_path)


NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A headless browser, driven over a pipe by its debugging protocol."""

    FLAGS = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--remote-debugging-pipe",
    )

    def __init__(self, profile):
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()

        # The browser reads commands from descriptor 3 and answers on 4.
        line = f'exec {BROWSER} "$@" 3<&{their_in} 4>&{their_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "browser", *self.FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self._numbers, self._buffer, self.events = itertools.count(1), b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session = None

    def call(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        while b"\0" not in self._buffer:
            piece = os.read(self._in, 1 << 16)
            assert piece, "the browser has gone"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(message)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, url, width):
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=844,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def evaluate(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        try:
            self.call("Browser.close")
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._in)
            os.close(self._out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no chromium or chrome on this machine")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


MEASURES = """({
  title: document.title,
  width: document.documentElement.scrollWidth,
  inner: window.innerWidth,
  sections: [...document.querySelectorAll('section h2')].map(e => e.textContent),
  badges: [...document.querySelectorAll('.badge')].map(e => e.textContent),
  images: [...document.images].map(e => [e.complete, e.naturalWidth, e.width]),
  text: parseFloat(getComputedStyle(document.body).fontSize),
  smallest: Math.min(...[...document.querySelectorAll('body *')]
    .filter(e => e.textContent.trim()).map(e => parseFloat(getComputedStyle(e).fontSize))),
  outside: [...document.querySelectorAll('section > *, header *')].filter(
    e => e.getBoundingClientRect().right > window.innerWidth + 0.5).map(e => e.outerHTML),
})"""


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_at_phone_and_desktop_width(browser, page, width):
    browser.open(page.as_uri(), width)
    seen = browser.evaluate(MEASURES)
    assert seen["title"] == "jaxkit: 3 runs"
    assert seen["inner"] == width
    assert seen["width"] <= width  # no sideways scrolling
    assert seen["outside"] == []
    assert len(seen["sections"]) == 3
    assert seen["sections"][0] == "A line and a curve <fitted> to a sum"
    assert seen["badges"] == ["held", "not held", "not testable"]
    assert seen["images"]
    assert all(done and natural > 0 and shown <= width for done, natural, shown in seen["images"])
    assert seen["text"] >= 16
    assert seen["smallest"] >= 11
    time.sleep(0.2)  # late complaints
    browser.evaluate("0")
    complaints = [
        event
        for event in browser.events
        if event["method"]
        in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    ]
    assert complaints == []
    requests = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    if folder := os.environ.get("JAXKIT_SCREENSHOTS"):
        browser.screenshot(page.parent / f"{width}.png")
        shutil.copy(page.parent / f"{width}.png", folder)


def test_the_browser_check_sees_errors(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<p style='width:900px'>wide<script>nothing()</script>")
    browser.open(bad.as_uri(), 390)
    assert browser.evaluate(MEASURES)["width"] > 390
    assert any(event["method"] == "Runtime.exceptionThrown" for event in browser.events)
