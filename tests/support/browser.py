"""A Chromium without a screen or a network, for pages that people click on."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

CHROMIUM = ("chromium", "google-chrome", "chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-prefers-reduced-motion",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no name is looked up
)


def missing() -> str:
    """Why there is no browser here; empty if there is one."""
    if not any(map(shutil.which, CHROMIUM)):
        return "no Chromium: apt-get install chromium chromium-driver"
    if not shutil.which("chromedriver"):
        return "no chromedriver: apt-get install chromium-driver"
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed: pip install '.[dev]'"
    return ""


def start(folder: Path):
    """A driver whose profile lies in a folder; there must be a browser."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, CHROMIUM)))
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))  # nothing is downloaded
    return webdriver.Chrome(options=options, service=service)


def complaints(driver) -> list[str]:
    """What the console of the page says, but for what tests cause that read pixels."""
    said = [entry["message"] for entry in driver.get_log("browser")]
    return [message for message in said if "willReadFrequently" not in message]
