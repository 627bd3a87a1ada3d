"""Open every page of the built site in a browser, as wide as a desk and as narrow as a phone.

A page fails if its console complains, if something is loaded from elsewhere, if a picture does not show, or if it is
wider than a phone. Then a word is searched for, and the page is made dark. Without a browser this says so and does
nothing.

    python tools/docs/look.py .nox/site [--pictures FOLDER]
"""

from __future__ import annotations

import argparse
import functools
import http.server
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from support import browser

WIDTHS = (1280, 390)
_BROKEN = "return [...document.images].filter((one) => !one.complete || !one.naturalWidth).map((one) => one.src)"
_LOADED = "return performance.getEntriesByType('resource').map((one) => one.name)"
_TOO_WIDE = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


def problems(driver: Any, address: str, name: str) -> Iterator[str]:
    """What is wrong with the page that is open."""
    yield from (f"{name}: {message}" for message in browser.complaints(driver))
    loaded = driver.execute_script(_LOADED)
    yield from (f"{name}: loads {url}" for url in loaded if not url.startswith((address, "data:", "blob:")))
    yield from (f"{name}: does not show {url}" for url in driver.execute_script(_BROKEN))
    if driver.execute_script(_TOO_WIDE) > 0:
        yield f"{name}: wider than {driver.get_window_size()['width']} pixels"


def search(driver: Any, address: str) -> Iterator[str]:
    """Search must find the glossary."""
    driver.set_window_size(WIDTHS[0], 900)
    driver.get(f"{address}index.html")
    driver.find_element("css selector", "input.md-search__input").send_keys("retained tokens")
    for _ in range(60):
        if driver.find_elements("css selector", ".md-search-result__item"):
            return
        time.sleep(0.5)
    yield "search finds nothing"


def dark(driver: Any, address: str) -> Iterator[str]:
    """The button beside the search must make the page dark, and the next page stays so."""
    driver.get(f"{address}index.html")
    scheme = "return document.body.dataset.mdColorScheme"
    bright = driver.execute_script(scheme)
    driver.find_element("css selector", "form[data-md-component=palette] label:not([hidden])").click()
    driver.get(f"{address}faq.html")
    if driver.execute_script(scheme) == bright:
        yield f"the button for dark and light leaves the page as it is: {bright}"


def main() -> int:
    """Print what is wrong; the exit status."""
    parser = argparse.ArgumentParser(description="Look at the built site in a browser.")
    parser.add_argument("site", type=Path)
    parser.add_argument("--pictures", type=Path, help="write a picture of each page into this folder")
    options = parser.parse_args()
    if browser.missing():
        print(f"skipped: {browser.missing()}")
        return 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(options.site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    files = [path for path in sorted(options.site.rglob("*.html")) if path.name != "404.html"]
    pages = [path.relative_to(options.site).as_posix() for path in files]
    found: list[str] = []
    with tempfile.TemporaryDirectory() as profile:
        driver = browser.start(Path(profile))
        try:
            for width in WIDTHS:
                driver.set_window_size(width, 900)
                for page in pages:
                    driver.get(address + page)
                    found += problems(driver, address, f"{page} at {width}")
                    if options.pictures:
                        options.pictures.mkdir(parents=True, exist_ok=True)
                        driver.save_screenshot(str(options.pictures / f"{page.replace('/', '-')}-{width}.png"))
            found += search(driver, address)
            found += dark(driver, address)
        finally:
            driver.quit()
            server.shutdown()
    print(*found, f"{len(pages)} pages at {len(WIDTHS)} widths, {len(found)} problems", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
