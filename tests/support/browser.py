"""Headless Chromium, as a person's browser: what pages look like in it, and what they ask for."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.command import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = """--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --force-device-scale-factor=1"""
# Only loopback can be reached: a page that asks for anything else gets an error, which the console shows.
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
# Looks at each page in a frame of the width it is given, and leaves what it found as text.
LOOK = """<body style="margin:0">%s<pre id=found></pre><script>
onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    found[frame.id] = {
      width: root.clientWidth, needed: root.scrollWidth, text: page.body.innerText, title: page.title,
      background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      requests: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
      images: [...page.images].map(image => [image.alt, image.complete ? image.naturalWidth : 0]),
      drawn: [...page.querySelectorAll("svg[role=img]")].map(svg => svg.getAttribute("aria-label")),
      marks: [...page.querySelectorAll("circle, rect")].filter(mark => mark.getBoundingClientRect().width > 0).length,
      elements: [...new Set([...page.querySelectorAll("*")].map(element => element.localName))],
      links: [...page.querySelectorAll("a")].map(link => link.href),
    };
  }
  console.log("looked");
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script>"""


@dataclass(frozen=True)
class Seen:
    """`frames`: by name, what is in each page. `console`: what pages wrote to it. `asked`: paths that were requested.

    `screenshot`: of dark pages alone.
    """

    frames: dict[str, dict[str, Any]]
    console: list[str]
    asked: set[str]
    screenshot: Path


def look(folder: Path, frames: Mapping[str, tuple[str, int]], *, dark: bool) -> Seen:
    """Open files of `folder`, each in a frame of so many pixels, by name: `{"phone": ("report.html", 390)}`."""
    tags = [
        f'<iframe id="{name}" src="{file}" width={width} height=900></iframe>' for name, (file, width) in frames.items()
    ]
    (folder / "look.html").write_text(LOOK % "\n".join(tags), encoding="utf-8")
    asked: set[str] = set()
    handler = functools.partial(_Handler, asked, directory=str(folder))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        tempfile.TemporaryDirectory(prefix="hfq-browser-", ignore_cleanup_errors=True) as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        screenshot = folder / "screenshot.png"
        flags = [*QUIET.split(), OFFLINE, f"--user-data-dir={profile}", "--window-size=1700,1000"]
        flags += ["--no-sandbox"] if os.getuid() == 0 else []
        flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom"]
        flags += [f"--screenshot={screenshot}"] if dark else []
        address = f"http://127.0.0.1:{server.server_port}/look.html"
        done = subprocess.run([str(CHROMIUM), *flags, address], capture_output=True, text=True, timeout=PATIENCE)
        server.shutdown()
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"The page did not load: {done.stderr}"
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\xa0").replace("&amp;", "&")
    console = re.findall(r"INFO:CONSOLE.*?\] (.*)", done.stderr)
    return Seen(json.loads(text), console, asked, screenshot)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, asked: set[str], *args: Any, **kwargs: Any) -> None:
        self._asked = asked
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self._asked.add(self.path)
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        """Standard error is the tests'."""
