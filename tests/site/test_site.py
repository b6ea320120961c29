"""The built site in a browser: `make docs`, then `make test-docs`.

The browser is the system's Chromium, driven by Playwright; RGD_CHROMIUM names another one.
"""

import contextlib
import functools
import html.parser
import http.server
import importlib
import json
import math
import os
import shutil
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import rgd
from rgd import reference

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "target" / "site" / "html"
SCREENSHOTS = ROOT / "target" / "site" / "screenshots"
CHROMIUM = os.environ.get("RGD_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ALL = sorted(path for path in BUILT.rglob("*.html") if "_static" not in path.parts)
PAGES = [
    path.relative_to(BUILT).as_posix()
    for path in ALL
    if path.name not in ("search.html", "genindex.html", "py-modindex.html")
]
VIEWS = [(width, scheme) for width in (400, 1400) for scheme in ("light", "dark")]

playwright = pytest.importorskip("playwright.sync_api", reason="make test-docs installs it")
pytestmark = pytest.mark.skipif(not PAGES, reason="make docs builds the site")


@contextlib.contextmanager
def served(folder):
    """The address of a folder, served from this process."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def site():
    with served(BUILT) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "the tests of the site need Chromium: apt install chromium, or name one in RGD_CHROMIUM"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, site):
    """A page that fails the test where the console has an error, or where a request leaves the site."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
    page.on(
        "response",
        lambda response: (
            problems.append(f"{response.status}: {response.url}") if response.status >= 400 else None
        ),
    )

    def keep_inside(route):
        if route.request.url.startswith((site, "data:", "blob:")):
            route.continue_()
        else:
            problems.append(f"leaves the site: {route.request.url}")
            route.abort()

    page.route("**/*", keep_inside)
    yield page
    context.close()
    assert problems == []


def typeset(page):
    """Wait until all formulas are drawn."""
    page.evaluate("window.MathJax?.startup?.promise")


@pytest.mark.parametrize("path", PAGES)
def test_a_page_loads_in_every_view_without_an_error_or_overflow(page, site, path):
    page.goto(f"{site}/{path}", wait_until="load")
    typeset(page)
    assert page.locator("[data-mjx-error], mjx-merror").count() == 0
    assert page.locator("article h1").count() == 1
    for width, scheme in VIEWS:
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        name = path.removesuffix(".html").replace("/", "-")
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", animations="disabled")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (width, scheme)
        broken = page.evaluate(
            "[...document.images].filter(one => one.complete && !one.naturalWidth).map(one => one.src)"
        )
        assert broken == []


class Links(html.parser.HTMLParser):
    """The links of a page, and what they may point at in it."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors.update(filter(None, (attributes.get("id"), attributes.get("name"))))
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]


def test_every_link_within_the_site_leads_somewhere():
    parsed = {path: Links(path) for path in ALL}
    broken, followed = [], 0
    for path, found in parsed.items():
        for link in found.links:
            address = urllib.parse.urlsplit(link)
            if address.scheme or address.netloc:
                continue
            followed += 1
            target = (path.parent / urllib.parse.unquote(address.path)).resolve() if address.path else path
            anchor = urllib.parse.unquote(address.fragment)
            known = not anchor or target not in parsed or anchor in parsed[target].anchors
            if not target.exists() or not known:
                broken.append((path.relative_to(BUILT).as_posix(), link))
    assert broken == []
    assert followed > 1000


@pytest.mark.parametrize(
    ("word", "page_found"),
    [("CVaR", "docs/weightings.html"), ("linear_cross_entropy", "reference/rgd.torch.html")],
)
def test_the_search_finds(page, site, word, page_found):
    page.goto(f"{site}/search.html?q={word}")
    page.wait_for_selector(f"#search-results ul.search a[href*='{page_found}']")


def test_the_formulas_are_drawn(page, site):
    page.goto(f"{site}/docs/mathematics.html")
    typeset(page)
    written = page.locator(".math").count()
    assert written > 40
    assert page.locator("mjx-container svg").count() == written
    assert "\\operatorname" not in page.inner_text("article")


def test_names_lead_to_the_reference(page, site):
    page.goto(f"{site}/docs/weightings.html")
    page.locator("a:has(code)", has_text="rgd.KLBall(radius)").first.click()
    page.wait_for_url(f"{site}/reference/rgd.html#rgd.KLBall")
    for name in rgd.__all__:
        assert page.locator(f"[id='rgd.{name}']").count() == 1, name


def test_the_colours_can_be_chosen(page, site):
    page.emulate_media(color_scheme="light")
    page.goto(f"{site}/index.html")
    for mode, theme in [("dark", "dark"), ("light", "light"), ("dark", "dark"), ("auto", "light")]:
        page.locator("button.theme-switch-button:visible").first.click()
        page.locator(f"button.theme-change-button[data-mode={mode}]:visible").first.click()
        assert page.evaluate("document.documentElement.dataset.theme") == theme


def test_code_can_be_copied(page, site):
    page.goto(f"{site}/index.html")
    assert page.locator("button.copybtn").count() >= 5


def test_notebooks_have_their_outputs(page, site):
    page.goto(f"{site}/examples/quickstart.html")
    assert page.locator(".cell_output").count() >= 3
    assert page.locator(".cell_output img").count() >= 1


def test_a_site_alone_offers_no_choice_of_versions(page, site):
    page.goto(f"{site}/index.html", wait_until="networkidle")
    assert page.locator("#version").count() == 0


def test_a_reader_changes_the_version_and_stays_on_the_page(browser, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    publish = importlib.import_module("publish").publish
    for version in ("0.9.0", "main", "0.10.0"):
        publish(BUILT, tmp_path, version)
    (tmp_path / "0.9.0" / "docs" / "numpy.html").unlink()
    with served(tmp_path) as address, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{address}/index.html")
        page.wait_for_url(f"{address}/0.10.0/")
        page.goto(f"{address}/0.10.0/docs/torch.html#top")
        chooser = page.get_by_label("Version", exact=True)
        assert chooser.locator("option").all_text_contents() == ["0.10.0", "0.9.0", "main"]
        assert chooser.input_value() == "0.10.0"
        chooser.select_option("main")
        page.wait_for_url(f"{address}/main/docs/torch.html#top")
        assert page.get_by_label("Version", exact=True).input_value() == "main"
        # A version without the page begins at its first one.
        page.goto(f"{address}/main/docs/numpy.html")
        page.get_by_label("Version", exact=True).select_option("0.9.0")
        page.wait_for_url(f"{address}/0.9.0/")


# The page "Try it".


def batches():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 40):
        yield rng.exponential(1.5, size)
        yield rng.exponential(1.5, size).round(1)  # with ties
        yield np.full(size, 0.7)


def test_its_weights_are_those_of_the_oracle(page, site):
    page.goto(f"{site}/try.html")
    losses = [batch.tolist() for batch in batches()]
    found = page.evaluate(
        """batches => {
            const at = ({from, to}, part) => Number((from + part * (to - from)).toFixed(2));
            const settingsOf = ({settings}, part) =>
                Object.fromEntries(settings.map((one, i) => [one.name, at(one, i ? 1 - part : part)]));
            return members.flatMap(member => [0, 0.13, 0.37, 0.5, 0.77, 1].flatMap(part => {
                const settings = settingsOf(member, part);
                const code = member.code(settings);
                return batches.map(losses => [code, losses, member.weights(losses, settings)]);
            }));
        }""",
        losses,
    )
    kinds = set()
    for code, batch, weights in found:
        weighting = eval(code, {"rgd": rgd, "math": math})
        kinds.add(type(weighting))
        expected = reference.sample_weights(np.array(batch), weighting)
        # A root is found to the last bit. Means over the batch have its length in rounding errors, and steep
        # exponentials multiply those.
        tolerance = 64 * len(batch) * np.finfo(np.float64).eps * np.max(np.abs(expected))
        np.testing.assert_allclose(weights, expected, rtol=0, atol=tolerance, err_msg=f"{code} of {batch}")
    stateless = {
        kind
        for name in rgd.__all__
        if isinstance(kind := getattr(rgd, name), type) and issubclass(kind, rgd.Weighting)
    } - {rgd.Weighting, rgd.Pointwise, rgd.MovingAverage, rgd.GroupDRO, rgd.Excess, rgd.EntropyGate}
    assert kinds == stateless


def drawn(page):
    """The weights as the chart tells them to a screen reader."""
    return [float(word) for word in page.get_attribute("#try-chart", "aria-label").split(": ")[1].split(", ")]


def test_a_slider_moves_the_weights_and_the_line_of_python(page, site):
    page.goto(f"{site}/try.html")
    assert page.inner_text("#try-code") == "rgd.KL(scale=-0.7)"
    first = drawn(page)
    assert first == sorted(first, reverse=True)
    page.locator("#try-scale").fill("0.5")
    assert page.inner_text("#try-code") == "rgd.KL(math.inf, scale=0.5)"
    assert drawn(page) == sorted(drawn(page))
    page.select_option("#try-weighting", label="CVaR")
    page.locator("#try-alpha").fill("0.2")
    assert page.inner_text("#try-code") == "rgd.CVaR(0.2)"
    assert drawn(page) == [0.0] * 8 + [5.0] * 2


def test_a_point_can_be_dragged_to_another_loss(page, site):
    page.goto(f"{site}/try.html")
    before = drawn(page)
    box = page.locator(".try-sample").nth(9).bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] - 200, middle, steps=4)
    page.mouse.up()
    assert drawn(page)[:9] == before[:9]
    assert drawn(page)[9] > before[9]


def test_the_page_tells_what_the_picture_shows(page, site):
    page.goto(f"{site}/try.html")
    page.select_option("#try-weighting", label="ERM, plain training")
    assert json.dumps(drawn(page)) == json.dumps([1.0] * 10)
    assert "Mean weight 1.00, largest 1.00" in page.inner_text("#try-told")
    assert "plain mean of 10.0 of the 10 samples" in page.inner_text("#try-told")
