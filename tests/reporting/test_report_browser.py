"""Report pages in a real headless Chromium: no errors or requests, figures drawn, tables sort, phones do not scroll."""

from __future__ import annotations

import json
import os
import shutil
import threading

import pytest
from kinds import KINDS as RUNS

from zokernel.commands.report import read
from zokernel.reporting.html import write_report
from zokernel.reporting.serve import make_server

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")

KINDS = ("finetune", "plan", "kernel", "evolve", "reproduce")
# What the legend of the loss shows: colour, and dash or marker, of each series.
LOOKS = """() => [...document.querySelectorAll('#loss .legend span')].map((item) => {
  const one = item.querySelector('polyline, circle'), style = getComputedStyle(one);
  return [one.tagName === 'circle' ? style.fill : style.stroke, one.getAttribute('stroke-dasharray') ?? 'dot'];
})"""
# Texts of figures that reach beyond them, by more than the rounding of coordinates.
CLIPPED = """() => [...document.querySelectorAll('figure svg')].flatMap((svg) => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter((text) => {
    const at = text.getBoundingClientRect();
    return at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1;
  }).map((text) => text.textContent);
})"""
# The contrast of every visible text with what is behind it, by the formula of WCAG 2.
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => 0.2126 * linear(c[0] / 255) + 0.7152 * linear(c[1] / 255) + 0.0722 * linear(c[2] / 255);
  let worst = [99, ''];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), holder = walk.currentNode.parentElement;
    if (!text || !holder.getClientRects().length || holder.closest('svg, script, style')) continue;
    let behind = holder, back = rgb(getComputedStyle(behind).backgroundColor);
    while (back[3] < 255 && behind.parentElement) {
      behind = behind.parentElement;
      back = rgb(getComputedStyle(behind).backgroundColor);
    }
    const [a, b] = [light(rgb(getComputedStyle(holder).color)), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, text.slice(0, 40)];
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        # Without a sandbox only where Chromium refuses to start with one: as root, in a container.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield running
        running.close()


@pytest.fixture(scope="module")
def files(run_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    paths = {kind: folder / f"{kind}.html" for kind in KINDS}
    for kind, path in paths.items():
        write_report(read(run_folders[kind]), path)
    return paths


@pytest.fixture
def open_page(browser):
    """Open an address at a width and colour scheme; complaints and requests are collected on the page."""
    contexts = []

    def visit(address: str, *, width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.complaints, page.requests = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_renders_without_complaints_or_requests(kind, files, open_page):
    page = open_page(files[kind].as_uri())
    drawings = page.locator("figure svg")
    assert drawings.count() > 0
    for number in range(drawings.count()):
        box = drawings.nth(number).bounding_box()
        assert box["width"] > 150, kind
        assert box["height"] > 80, kind
        assert drawings.nth(number).locator("path").count() > 3
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("kind", RUNS)
def test_the_page_of_every_kind_of_training_run_fits_and_can_be_read(kind, kinds, open_page, tmp_path):
    write_report(read(kinds(kind)), tmp_path / "page.html")
    for width, scheme in ((1280, "light"), (390, "dark")):
        page = open_page((tmp_path / "page.html").as_uri(), width=width, scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CONTRAST)[0] >= 4.5
        assert page.evaluate(CLIPPED) == []
        for drawing in page.locator("figure svg").all():
            assert drawing.bounding_box()["width"] >= min(340, width - 60)
        assert page.complaints == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_does_not_scroll_sideways_and_text_is_readable(kind, scheme, files, open_page):
    page = open_page(files[kind].as_uri(), width=390, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ratio, text = page.evaluate(CONTRAST)
    assert ratio >= 4.5, f"{text!r} has contrast {ratio:.2f}"


def test_tables_sort_by_any_column(files, open_page):
    page = open_page(files["kernel"].as_uri())
    heads = page.locator("table").first.locator("th")
    button = heads.nth(0).locator("button")

    def column() -> list[float]:
        return [float(text.replace(",", "")) for text in page.locator("tbody tr td:first-child").all_inner_texts()]

    assert column() == [1, 5, 25, 125]
    button.focus()
    page.keyboard.press("Enter")
    assert heads.nth(0).get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert heads.nth(0).get_attribute("aria-sort") == "descending"
    assert column() == [125, 25, 5, 1]
    heads.nth(1).locator("button").click()  # the measured error falls with P
    assert column() == [125, 25, 5, 1]
    assert heads.nth(0).get_attribute("aria-sort") == "none"
    assert page.complaints == []


def test_words_sort_too(files, open_page):
    page = open_page(files["reproduce"].as_uri())
    head = page.locator("#verdicts th", has_text="verdict")
    head.locator("button").click()
    verdicts = page.locator("#verdicts tbody tr td:nth-child(2)").all_inner_texts()
    assert verdicts == sorted(verdicts)
    assert len(set(verdicts)) > 1


def test_figures_enlarge_and_zoom_with_the_keyboard(files, open_page):
    page = open_page(files["evolve"].as_uri())
    button = page.locator("button.drawing").first
    before = button.locator("svg").get_attribute("viewBox")
    button.focus()
    page.keyboard.press("Enter")
    drawing = page.locator("dialog svg")
    playwright_api.expect(drawing).to_be_visible()
    assert drawing.bounding_box()["width"] > 900
    page.keyboard.press("+")
    zoomed = drawing.get_attribute("viewBox")
    assert float(zoomed.split()[2]) < 0.8 * float(before.split()[2])
    page.keyboard.press("ArrowRight")
    assert float(drawing.get_attribute("viewBox").split()[0]) > float(zoomed.split()[0])
    page.mouse.move(640, 400)
    page.mouse.wheel(0, 200)
    page.keyboard.press("Escape")
    playwright_api.expect(drawing).to_have_count(0)
    assert button.locator("svg").get_attribute("viewBox").split()[2] == before.split()[2]
    playwright_api.expect(button).to_be_focused()
    assert page.complaints == []


def test_the_colours_can_be_switched(files, open_page):
    page = open_page(files["plan"].as_uri(), scheme="light")

    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background()
    page.locator("#theme").click()
    assert background() != light
    assert page.locator("#theme").get_attribute("aria-label") == "Switch to light colours"
    page.reload()
    # What was chosen is remembered; the browser may write it a moment after the click.
    playwright_api.expect(page.locator("body")).not_to_have_css("background-color", light)
    assert page.complaints == []


def test_a_live_run_appears_as_it_goes(open_page, tmp_path):
    rows = [{"step": n, "loss": 2.0 / n, "projected_gradient": 1.0 + n % 3, "seconds": 0.25 * n} for n in range(1, 40)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "run.json").write_text(json.dumps({"total_steps": 100}))
    (tmp_path / ".lock").write_text(f"pid {os.getpid()}")
    name = "/".join(tmp_path.parts[-2:])
    with make_server(tmp_path, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            page = open_page(f"http://127.0.0.1:{server.server_address[1]}/", width=390)
            assert "Waiting" in page.locator("#status").inner_text()
            assert page.title() == f"waiting · {name}"
            assert page.locator("section:visible").count() == 0, "an empty panel"
            (tmp_path / "steps.jsonl").write_text("".join(lines[:10]))
            page.wait_for_selector("#loss svg")
            assert "step 10 of 100" in page.locator("#status").inner_text()
            assert page.title() == f"10 % · {name}"
            (tmp_path / "steps.jsonl").write_text("".join(lines))
            playwright_api.expect(page.locator("#status")).to_contain_text("step 39")
            assert page.title() == f"39 % · {name}"
            assert page.locator("#progress").evaluate("bar => bar.value") == 39
            facts = page.locator("#facts").inner_text()
            assert "39 of 100" in facts
            assert f"about {0.25 * 61:.0f} s" in facts
            assert page.locator("#gradient .chart circle").count() == 39
            looks = page.evaluate(LOOKS)
            assert len(looks) == 2
            assert len({look[0] for look in looks}) == len({look[1] for look in looks}) == 2, looks
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            assert page.complaints == []
            assert all(url.startswith(("http://127.0.0.1", "data:")) for url in page.requests)
            page.close()
        finally:
            server.shutdown()
            thread.join()


def test_a_live_run_on_rewards_shows_the_spread_of_its_population(open_page, kinds, tmp_path):
    folder = tmp_path / "rewarded"
    shutil.copytree(kinds("reward"), folder)
    (folder / "metrics.json").unlink()
    steps = len((folder / "steps.jsonl").read_text().splitlines())
    with make_server(folder, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            for width in (1280, 390):
                page = open_page(f"http://127.0.0.1:{server.server_address[1]}/", width=width)
                page.wait_for_selector("#rewards svg")
                assert page.locator("#rewards .chart polygon").count() == 2
                assert len(page.locator("#rewards .chart polygon").first.get_attribute("points").split()) == 2 * steps
                assert "median member" in page.locator("#rewards .legend").inner_text()
                assert "reward" in page.locator("#scores").inner_text().split()
                assert "negative reward" in page.locator("#loss").inner_text()
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert page.complaints == []
                page.close()
        finally:
            server.shutdown()
            thread.join()
