"""In a real browser: the Pareto page in Voila and JupyterLab, and the saved page with no server and no network."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import plotly.io
import plotly.offline
import pytest

from trapetum import figures, records
from trapetum.paths import NOTEBOOKS, PUBLISHED

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [
    name
    for name, found in (
        ("chromium", CHROMIUM),
        ("playwright", importlib.util.find_spec("playwright")),
        ("voila", importlib.util.find_spec("voila")),
    )
    if not found
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

QUIET = (
    "--disable-gpu --disable-background-networking --disable-component-update --disable-sync --disable-quic"
)
PLOT = ".js-plotly-plot .main-svg"
CHAPTER = NOTEBOOKS / "07_pareto.ipynb"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*QUIET.split(), "--no-first-run"]
        )
        yield launched
        launched.close()


@pytest.fixture
def page(browser):
    opened = browser.new_page(viewport={"width": 1200, "height": 1600})
    yield opened
    opened.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {process.stdout.read()[-2000:]}")
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"{url} did not answer within {seconds} s")


def serve(command: list[str], url: str, folder: Path, **environment):
    """Start a server in `folder`, wait until `url` answers, and end it afterwards."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRAPETUM_LIVE", "PLOTLY_RENDERER")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(url, process)
        yield url
    finally:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@pytest.fixture
def voila(tmp_path):
    port = free_port()
    shutil.copy(CHAPTER, tmp_path)
    command = [
        sys.executable,
        "-m",
        "voila",
        CHAPTER.name,
        "--no-browser",
        f"--port={port}",
        "--Voila.ip=127.0.0.1",
    ]
    yield from serve(command, f"http://127.0.0.1:{port}/voila/static/voila.js", tmp_path)


@pytest.fixture
def lab(tmp_path):
    port = free_port()
    shutil.copy(CHAPTER, tmp_path)
    server = {
        "ip": "127.0.0.1", "port": port, "open_browser": False, "allow_root": True, "disable_check_xsrf": True,
        "root_dir": str(tmp_path),
    }  # fmt: skip
    config = tmp_path / "config"
    config.mkdir()
    text = json.dumps({"ServerApp": server, "IdentityProvider": {"token": ""}})
    (config / "jupyter_server_config.json").write_text(text)
    command = [sys.executable, "-m", "jupyter", "lab"]
    url = f"http://127.0.0.1:{port}/lab"
    yield from serve(command, url, tmp_path, JUPYTER_CONFIG_DIR=str(config))


def marker_places(page, plot: int) -> list[str]:
    """Where the markers of a plot are drawn, as the SVG says."""
    return page.locator(".js-plotly-plot").nth(plot).locator(".scatterlayer path.point").evaluate_all(
        "paths => paths.map(p => p.getAttribute('transform'))"
    )  # fmt: skip


def wait_for_change(read, before, seconds: float = 15):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = read()
        if now and now != before:
            return now
        time.sleep(0.1)
    raise AssertionError(f"nothing changed within {seconds} s")


def test_voila_slider_moves_the_live_plot(page, voila):
    base = voila.split("/voila/")[0]
    page.goto(base, wait_until="commit", timeout=120_000)
    page.locator(".noUi-handle").first.wait_for(timeout=120_000)
    page.locator(PLOT).first.wait_for(timeout=120_000)
    live = page.locator(".jupyter-widgets .js-plotly-plot, .jp-OutputArea .widget-vbox .js-plotly-plot").last
    live.locator(".main-svg").first.wait_for(timeout=60_000)
    index = page.locator(".js-plotly-plot").count() - 1
    before = wait_for_change(lambda: marker_places(page, index), [])
    handle = page.locator(".noUi-handle").first
    handle.focus()
    for _ in range(5):
        handle.press("ArrowRight")
    after = wait_for_change(lambda: marker_places(page, index), before)
    assert after != before


def test_jupyterlab_runs_the_chapter(page, lab):
    page.goto(f"{lab}/tree/{CHAPTER.name}?reset", wait_until="domcontentloaded", timeout=120_000)
    page.get_by_text("| Idle").first.wait_for(timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(PLOT).first.wait_for(timeout=120_000)
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0


@pytest.fixture
def saved(tmp_path):
    """The Pareto figure of published records in a page of its own, as the report embeds it."""
    group = next(iter(figures.groups(figures.tradeoffs(records.load(PUBLISHED).records)).values()))
    body = plotly.io.to_html(figures.pareto(group), include_plotlyjs=False, full_html=False)
    script = f"<script>{plotly.offline.get_plotlyjs()}</script>"
    path = tmp_path / "pareto.html"
    path.write_text(
        f"<!doctype html><html><head><meta charset='utf-8'>{script}</head><body>{body}</body></html>"
    )
    return path


def open_saved(page, path: Path) -> list[str]:
    """Open a saved page and collect every request that is not the file itself, and every console error."""
    trouble: list[str] = []
    page.on(
        "request",
        lambda r: trouble.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None,
    )
    page.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.goto(path.as_uri())
    page.locator(PLOT).first.wait_for(timeout=30_000)
    return trouble


def click_slider(page, number: int, share: float) -> None:
    rail = page.locator(".slider-rail-touch-rect").nth(number)
    box = rail.bounding_box()
    rail.click(position={"x": box["width"] * share, "y": box["height"] / 2}, force=True)


def test_saved_page_needs_neither_kernel_nor_network(page, saved):
    trouble = open_saved(page, saved)
    before = wait_for_change(lambda: marker_places(page, 0), [])
    click_slider(page, 0, 0.98)
    longer = wait_for_change(lambda: marker_places(page, 0), before)
    click_slider(page, 1, 0.35)
    colours = (
        "paths => paths.map(p => getComputedStyle(p).fill + getComputedStyle(p.closest('.trace')).opacity)"
    )
    shown = page.locator(".scatterlayer path.point").evaluate_all(colours)
    assert any("rgb(211, 216, 220)" in s for s in shown), "points above the limit turn grey"
    page.locator(".updatemenu-header").first.click()
    page.locator(".updatemenu-dropdown-button").nth(1).click()
    wait_for_change(lambda: marker_places(page, 0), longer)
    assert "perplexity above" in page.locator(".xtitle").text_content()
    assert trouble == []


def test_controls_of_the_saved_page_work_together(page, saved):
    """A limit that was set stays when the context or the axes change: each control changes something of its own."""
    open_saved(page, saved)
    read = "() => document.querySelector('.js-plotly-plot').data.map(t => [t.visible, t.opacity])"
    unlimited = page.evaluate(read)
    click_slider(page, 1, 0.35)
    limited = wait_for_change(lambda: page.evaluate(read), unlimited)
    places = marker_places(page, 0)
    click_slider(page, 0, 0.5)
    wait_for_change(lambda: marker_places(page, 0), places)
    assert page.evaluate(read) == limited
    page.locator(".updatemenu-header").first.click()
    page.locator(".updatemenu-dropdown-button").nth(1).click()
    wait_for_change(lambda: page.evaluate(read), limited)
    after = page.evaluate(read)
    assert [opacity for _, opacity in after] == [opacity for _, opacity in limited]
