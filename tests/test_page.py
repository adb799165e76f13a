"""The page at / in a real browser: it asks, shows the answer as it grows, marks drafts, stops, and asks for a key."""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import time
from typing import Any

import pytest
from serving_fakes import FakeEngine, Live, wait_until

pytest.importorskip("uvicorn", reason="the server needs its extra: pip install -e '.[serve]'")

from specjax.serving.requests import Snapshot
from specjax.serving.server import Settings

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """A headless Chromium, driven over a pair of pipes."""

    def __init__(self, binary: str, profile: pathlib.Path):
        take, self._out = os.pipe()
        self._in, give = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--window-size=900,700"]
        # It reads commands from descriptor 3 and answers at 4.
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{take} 4>&{give}', binary, *flags, "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(take, give), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(take)
        os.close(give)
        self._rest, self._number, self._session = b"", 0, ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                data = os.read(self._in, 1 << 16)
                assert data, "the browser ended"
                self._rest += data
            line, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str) -> None:
        self.ask("Page.navigate", url=url)
        assert wait_until(lambda: self.run("document.readyState") == "complete", 20)

    def picture(self, path: pathlib.Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = [path for path in map(shutil.which, NAMES) if path]
    if not found:
        pytest.skip("no Chromium on this machine: install it, for example with apt-get install chromium")
    one = Browser(found[0], tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


def say(browser, text):
    browser.run(f"at('prompt').value = {json.dumps(text)}; at('form').requestSubmit()")


def pictured(browser, name):
    """Writes a picture where $SPECJAX_PICTURES says, for those who look at the page."""
    if directory := os.environ.get("SPECJAX_PICTURES"):
        for scheme in ("light", "dark"):
            browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            browser.picture(pathlib.Path(directory) / f"{name}_{scheme}.png")


@pytest.mark.budget(60)
def test_a_conversation(browser):
    text = "Speculative decoding drafts several tokens and scores them in one call: <b>é</b> & ü.\n" * 2
    engine = FakeEngine(lambda prompt, options, index: text, delay=0.02, burst=5, max_len=2048)
    engine.counts = Snapshot(1, 2, 8, 0, 1000, 0, 0, 0, 0, 0, 10, 40, 20, (10, 10), 3.5, 0)
    live = Live(engine, Settings(model="a-model"))
    browser.open(live.url)
    assert wait_until(lambda: browser.run("at('model').textContent") == "a-model")
    assert browser.run("getComputedStyle(at('settings')).display") == "none"
    pictured(browser, "empty")
    say(browser, "What is <i>speculative</i> decoding?")
    assert wait_until(lambda: browser.run("document.querySelectorAll('.assistant mark').length") > 3)
    assert browser.run("at('send').hidden")
    grown = "document.querySelector('.assistant').textContent.length"
    before = browser.run(grown)
    assert wait_until(lambda: browser.run(grown) > before), "the answer does not grow"
    assert wait_until(lambda: browser.run("document.body.dataset.answers") == "1", 20)
    parts = "[...document.querySelectorAll('.assistant > span, .assistant > mark')]"
    assert browser.run(f"{parts}.map(part => part.textContent).join('')") == text
    marked = browser.run(f"{parts}.filter(part => part.tagName === 'MARK').map(part => part.textContent).join('')")
    assert 0.5 < len(marked) / len(text) < 0.95
    assert browser.run("document.querySelectorAll('.turn b, .turn i').length") == 0  # Text is not markup.
    assert float(browser.run("at('speed').textContent")) > 1
    assert wait_until(lambda: browser.run("at('drafts').textContent") == "3.5")
    assert browser.run("at('acceptance').textContent") == "63 %"  # 5 of 8, of this answer
    assert "5 of 8 draft tokens accepted" in browser.run("document.querySelector('.note').textContent")
    pictured(browser, "answer")
    say(browser, "And again?")
    assert wait_until(lambda: browser.run("document.body.dataset.answers") == "2", 20)
    sent = bytes(token for token in engine.prompts[-1] if token < 256).decode()
    assert text in sent
    live.close()


@pytest.mark.budget(60)
def test_stop_frees_the_slot(browser):
    engine = FakeEngine(lambda *_: "x" * 5000, delay=0.05, max_len=9000)
    live = Live(engine)
    browser.open(live.url)
    assert wait_until(lambda: browser.run("model") == "specjax")
    say(browser, "x")
    assert wait_until(lambda: browser.run("document.querySelectorAll('.assistant span').length") > 0)
    browser.run("at('stop').click()")
    assert wait_until(lambda: engine.running == 0)
    assert wait_until(lambda: browser.run("document.querySelector('.note').textContent") == "Stopped.")
    live.close()


@pytest.mark.budget(60)
def test_a_key_is_asked_for_and_errors_are_shown(browser):
    live = Live(FakeEngine(), Settings(keys=("secret",)))
    browser.open(live.url)
    assert wait_until(lambda: "enter an API key" in browser.run("at('model').textContent"))
    assert not browser.run("at('settings').hidden")
    say(browser, "hello")
    assert wait_until(
        lambda: "API key is missing" in browser.run("document.querySelector('.error')?.textContent ?? ''")
    )
    browser.run("at('key').value = 'secret'; at('key').dispatchEvent(new Event('change'))")
    assert wait_until(lambda: browser.run("at('model').textContent") == "specjax")
    pictured(browser, "settings")
    time.sleep(0.05)
    live.close()
