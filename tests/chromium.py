"""A headless Chromium, driven through its DevTools protocol."""

import base64
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-port=0 --remote-allow-origins=*"
)


class Tab:
    """One tab; `requests` holds the addresses that it asked for, WebSockets too."""

    def __init__(self, connection: ClientConnection, address: str) -> None:
        self.connection, self.address, self.number, self.requests = connection, address, 0, []
        for domain in ("Page", "Network", "Runtime", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command."""
        self.number += 1
        self.connection.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (message := self.next()).get("id") != self.number:
            pass
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def next(self) -> dict[str, Any]:
        """The browser's next answer or event."""
        message = json.loads(self.connection.recv(timeout=60))
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") == "Network.webSocketCreated":
            self.requests.append(message["params"]["url"])
        return message

    @contextmanager
    def another(self) -> Iterator["Tab"]:
        """A second tab of the same browser."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        address = f"{self.address.rpartition('/')[0]}/{target}"
        with connect(address, max_size=None) as connection:
            yield Tab(connection, address)

    def open(self, address: str) -> None:
        """Goes to an address and waits until it is loaded."""
        self.send("Page.navigate", url=address)
        while self.next().get("method") != "Page.loadEventFired":
            pass

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> Any:
        """Waits until a JavaScript expression is true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"{expression} did not become true; the page says: {self.text()[:2000]}"
            time.sleep(0.05)
        return value

    def text(self) -> str:
        return self.js("document.body.innerText")

    def click(self, text: str, number: int = 0) -> None:
        """Clicks the button with a text; the `number`-th of several."""
        self.js(
            f"[...document.querySelectorAll('button')].filter(b => b.innerText.trim() === {text!r})[{number}].click()"
        )

    def give(self, selector: str, *files: Path) -> None:
        """Chooses files in an <input type=file>."""
        root = self.send("DOM.getDocument", depth=0)["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def drag(self, *points: tuple[float, float]) -> None:
        """Presses the mouse at the first point (pixels of the window), moves and releases it at the last."""
        for kind, (x, y) in [
            ("mousePressed", points[0]), *(("mouseMoved", point) for point in points), ("mouseReleased", points[-1])
        ]:  # fmt: skip
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def picture(self, path: Path) -> None:
        """Writes a PNG of the whole page."""
        self.send("Page.bringToFront")  # a tab behind another is drawn minutes later
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextmanager
def chromium(folder: Path, width: int = 1280, height: int = 1000) -> Iterator[Tab]:
    """A browser with its profile, and its downloads, in a folder."""
    profile = folder / "profile"
    command = [
        "chromium",
        *QUIET.split(),
        f"--user-data-dir={profile}",
        f"--window-size={width},{height}",
        "about:blank",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 60
            while not (port := profile / "DevToolsActivePort").is_file() or not port.read_text().strip():
                assert time.monotonic() < end, "Chromium does not start."
                time.sleep(0.1)
            with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            address = pages[0]["webSocketDebuggerUrl"]
            with connect(address, max_size=None) as connection:
                tab = Tab(connection, address)
                tab.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder / "downloads"))
                yield tab
        finally:
            process.terminate()
