"""Debian's chromium without a window, driven over its pipe as a user would drive it."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-sync", "--hide-scrollbars",
    "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One page; ``with Browser(path, 1280, 800) as page``.

    Messages of the DevTools protocol end with a zero byte and go through file
    descriptors 3 and 4.
    """

    def __init__(self, path, width=1280, height=800):
        if CHROMIUM is None:
            pytest.skip("chromium is not installed")
        (read, self._out), (self._in, write) = os.pipe(), os.pipe()
        # Away from the two numbers that chromium wants them under.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]
        command = [
            "bash", "-c", f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}', CHROMIUM,
            *FLAGS, f"--window-size={width},{height}", f"--user-data-dir={path}",
            "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, pass_fds=ends, stderr=subprocess.DEVNULL
        )
        for end in (read, write, *ends):
            os.close(end)
        self._numbers, self._held, self.errors = itertools.count(1), b"", []
        (target,) = [t for t in self._call("Target.getTargets")["targetInfos"]
                     if t["type"] == "page"]  # fmt: skip
        about = {"targetId": target["targetId"], "flatten": True}
        self._session = self._call("Target.attachToTarget", **about)["sessionId"]
        for part in ("Page", "Runtime", "Log"):
            self.call(f"{part}.enable")
        size = {"width": width, "height": height, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", deviceScaleFactor=1, **size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._call("Browser.close")
        self._process.wait(20)
        os.close(self._in), os.close(self._out)

    def call(self, method, **params):
        """Ask the page."""
        return self._call(method, session=self._session, **params)

    def _call(self, method, session=None, **params):
        number = next(self._numbers)
        asked = {"id": number, "method": method, "params": params}
        asked |= {"sessionId": session} if session else {}
        os.write(self._out, json.dumps(asked).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                more = os.read(self._in, 2**20)
                assert more, "chromium has ended"
                self._held += more
            said, _, self._held = self._held.partition(b"\0")
            answer = json.loads(said)
            self._note(answer)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _note(self, said):
        """Keep what the page throws."""
        if said.get("method") == "Runtime.exceptionThrown":
            self.errors.append(said["params"]["exceptionDetails"])

    def open(self, url):
        self.call("Page.navigate", url=url)

    def run(self, script):
        """The value of an expression in the page."""
        asked = {"expression": script, "returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, script, seconds=30):
        """Wait for an expression to be true; return it."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.05)
        return found

    def mouse(self, kind, x, y):
        held = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def click(self, x, y):
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def press(self, key, text=""):
        about = {"key": key, "code": key if len(key) > 1 else "", "text": text}
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9,
                " ": 32, "Enter": 13}.get(key, ord(key[0].upper()))  # fmt: skip
        about["windowsVirtualKeyCode"] = code
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def picture(self, path):
        """Save what a user sees now."""
        shown = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(shown))
