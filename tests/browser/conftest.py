"""A headless Chromium, and pages opened from files as a reader would."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.chromium import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    program = chromium()
    with sync_playwright() as driver:  # root has no user namespace to sandbox in
        yield driver.chromium.launch(executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else [])


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """visit(file, width=1280, **context options) -> the loaded page; at the end of the test it must have complained of nothing and asked
    for nothing but its own file."""
    opened, heard = [], []

    def go(file: Path, width: int = 1280, **options: object) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda request: None if request.url.split("#")[0] == file.as_uri() else heard.append(f"request: {request.url}"))
        page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
        page.goto(file.as_uri(), timeout=120_000)
        opened.append(context)
        return page

    yield go
    for context in opened:
        context.close()
    assert heard == []
