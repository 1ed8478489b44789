"""The gallery in a real browser, from `file://`: every path through it works, by mouse, by keyboard, on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, chromium
from galleries import make_run
from tubelet_lens.gallery.make_gallery import make_gallery

AT_PAGE = "location.pathname.includes('/latents/') && document.readyState === 'complete'"
AT_OVERVIEW = "location.pathname.endsWith('/index.html') && !!document.querySelector('.latents tbody tr')"
NUMBER = "Number(document.querySelector('h1').textContent.match(/\\d+/)[0])"
FRAME = "getComputedStyle(document.querySelector('.sheet')).transform + document.querySelector('.time input').value"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chromium()
    root = tmp_path_factory.mktemp("browsed")
    make_gallery(make_run(root / "made").config(root / "site"))
    return root / "site"


@pytest.fixture
def browser(site: Path) -> Iterator[Browser]:
    with Browser() as opened:
        yield opened
        assert opened.problems == []
        assert {address.partition(":")[0] for address in opened.requests} <= {"file", "about", "data"}


def data(site: Path) -> dict:
    return json.loads((site / "overview-data.js").read_text().removeprefix("window.tubelet = ").rstrip(";\n"))


def test_from_the_overview_to_a_latent_to_its_neighbor_and_back(site: Path, browser: Browser) -> None:
    browser.open(site / "index.html")
    assert browser.js("document.querySelectorAll('.latents tbody tr').length") == len(data(site)["latents"])
    browser.click(".latents tbody tr:nth-child(3) th a")
    browser.until(AT_PAGE)
    assert browser.js(NUMBER) == data(site)["latents"][2]
    browser.until(
        "[...document.querySelectorAll('.cards .sheet')].slice(0, 2).every((image) => image.naturalWidth > 0)"
    )
    neighbor = browser.js("Number(document.querySelector('.neighbors a b').textContent.match(/\\d+/)[0])")
    browser.click(".neighbors a")
    browser.until(f"{AT_PAGE} && {NUMBER} === {neighbor}")
    browser.click("#next") if browser.js("!!document.getElementById('next')") else browser.click("#previous")
    browser.until(f"{AT_PAGE} && {NUMBER} !== {neighbor}")
    browser.click("#up")
    browser.until(AT_OVERVIEW)


def test_a_click_on_a_point_opens_its_latent(site: Path, browser: Browser) -> None:
    browser.open(site / "index.html")
    browser.js("document.getElementById('plot').focus()")
    browser.press("ArrowRight")
    chosen = browser.js("document.querySelector('.chosen a').getAttribute('href')")
    # Points are found by pointing everywhere; another one is clicked in the middle of where it answers.
    answers = browser.js(
        "(() => { const plot = document.getElementById('plot'), box = plot.getBoundingClientRect(), found = {};"
        "for (let y = box.top; y < box.bottom; y += 6) for (let x = box.left; x < box.right; x += 6) {"
        "  plot.dispatchEvent(new PointerEvent('pointermove', {clientX: x, clientY: y, pointerType: 'mouse'}));"
        "  const link = document.querySelector('.chosen a').getAttribute('href');"
        "  if (plot.style.cursor === 'pointer') (found[link] = found[link] || []).push([x, y]);"
        "} return found; })()"
    )
    other, places = max(((link, at) for link, at in answers.items() if link != chosen), key=lambda pair: len(pair[1]))
    browser.click_at(*(sum(axis) / len(places) for axis in zip(*places, strict=True)))
    browser.until(AT_PAGE)
    assert f"/{other}" in browser.js("location.pathname")


def test_the_keyboard_is_enough(site: Path, browser: Browser) -> None:
    browser.open(site / "index.html")
    for _ in range(12):
        browser.press("Tab")
        if browser.js("document.activeElement.id") == "plot":
            break
    assert browser.js("document.activeElement.id") == "plot"
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "ArrowDown", "ArrowLeft"):
        browser.press(key)
    chosen = browser.js("document.querySelector('.chosen a').textContent")
    browser.press("Enter")
    browser.until(AT_PAGE)
    first = browser.js(NUMBER)
    assert chosen == f"Open latent {first}"
    assert browser.js("document.getElementById('play').getAttribute('aria-pressed')") == "true"
    browser.press(" ")
    assert browser.js("document.getElementById('play').getAttribute('aria-pressed')") == "false"
    browser.press("h")
    assert browser.js("document.querySelector('.map').hidden") is True
    forth, back = ("n", "p") if browser.js("!!document.getElementById('next')") else ("p", "n")
    browser.press(forth)
    browser.until(f"{AT_PAGE} && {NUMBER} !== {first}")
    browser.press(back)
    browser.until(f"{AT_PAGE} && {NUMBER} === {first}")
    # A definition opens by keyboard.
    browser.js("document.querySelector('.figures summary').focus()")
    browser.press("Enter")
    browser.until("document.querySelector('.figures details').open")
    browser.press("o")
    browser.until(AT_OVERVIEW)


def test_what_was_chosen_is_there_again_after_going_back(site: Path, browser: Browser) -> None:
    browser.open(site / "index.html")
    browser.js(
        "(() => { const x = document.getElementById('x');"
        "x.value = 'clip_share'; x.dispatchEvent(new Event('change')); })()"
    )
    browser.click(".latents thead th:nth-of-type(3) button")
    listed = "[...document.querySelectorAll('.latents tbody th')].map((cell) => cell.textContent).join()"
    order = browser.js(listed)
    browser.click(".latents tbody th a")
    browser.until(AT_PAGE)
    browser.js("history.back()")
    browser.until(AT_OVERVIEW)
    assert browser.js("document.getElementById('x').value") == "clip_share"
    assert browser.js(listed) == order
    assert browser.js("!!document.querySelector('.chosen a')")


def test_a_label_filters_a_number_jumps_and_a_missing_one_is_named(site: Path, browser: Browser) -> None:
    browser.open(site / "index.html")
    table = data(site)
    name = table["labels"][0]
    browser.js(
        f"(() => {{ const label = document.getElementById('label'); label.value = {json.dumps(name)};"
        "label.dispatchEvent(new Event('change')); })()"
    )
    assert browser.js("document.querySelectorAll('.latents tbody tr').length") == table["label"].count(0)
    browser.js("document.getElementById('number').focus()")
    browser.type("999")
    browser.press("Enter")
    # 999 is no latent of this SAE: the field itself refuses it, and nothing is opened.
    assert browser.js("location.pathname.endsWith('/index.html')")
    browser.js("document.getElementById('number').value = ''")
    browser.type(str(table["latents"][1]))
    browser.press("Enter")
    browser.until(AT_PAGE)
    assert browser.js(NUMBER) == table["latents"][1]


def test_clips_play_in_step_with_their_heat_maps(site: Path, browser: Browser) -> None:
    latent = data(site)["latents"][0]
    browser.open(site / "latents" / f"{latent:06d}.html")
    seen = set()
    for _ in range(40):
        seen.add(browser.js(FRAME))
        browser.js("new Promise((done) => setTimeout(done, 30))")
    assert len(seen) > 3
    browser.press(" ")
    paused = browser.js(FRAME)
    browser.js("new Promise((done) => setTimeout(done, 300))")
    assert browser.js(FRAME) == paused
    page = json.loads(browser.js("document.getElementById('data').textContent"))
    card, (steps, height, width) = page["cards"][0], page["grid"]
    from test_gallery import unpacked

    levels = unpacked(card["heat"], steps * height * width).reshape(steps, height, width)
    for frame in range(card["frames"]):
        browser.js(
            f"(() => {{ const time = document.querySelector('.time input'); time.value = {frame};"
            "time.dispatchEvent(new Event('input')); })()"
        )
        drawn = browser.js(
            "(() => { const map = document.querySelector('.map'), copy = new OffscreenCanvas(map.width, map.height);"
            "const context = copy.getContext('2d', {willReadFrequently: true}); context.drawImage(map, 0, 0);"
            "const pixels = context.getImageData(0, 0, map.width, map.height).data;"
            "return [...pixels].filter((_, i) => i % 4 === 3); })()"
        )
        step = frame * steps // card["frames"]
        assert [alpha > 0 for alpha in drawn] == (levels[step].ravel() > 0).tolist()
        assert browser.js("[...document.querySelectorAll('.bars')][0].querySelectorAll('.now').length") == 1
        now = "[...document.querySelector('.bars').children].findIndex((bar) => bar.className === 'now')"
        assert browser.js(now) == step
        place = browser.js(
            "(() => { const style = document.querySelector('.sheet').style;"
            "return [style.getPropertyValue('--column'), style.getPropertyValue('--row')].map(Number); })()"
        )
        assert place == [frame % card["columns"], frame // card["columns"]]


def test_hostile_captions_do_nothing(site: Path, browser: Browser) -> None:
    for page in (site / "index.html", next(iter((site / "latents").iterdir()))):
        browser.open(page)
        assert browser.js("window.hacked") is None
    assert "</script><script>" in browser.js("document.querySelector('.caption').textContent")


def test_reduced_motion_gives_still_images(site: Path) -> None:
    latent = data(site)["latents"][0]
    with Browser(still=True) as browser:
        browser.open(site / "latents" / f"{latent:06d}.html")
        first = browser.js(FRAME)
        browser.js("new Promise((done) => setTimeout(done, 500))")
        assert browser.js(FRAME) == first
        assert browser.js("document.getElementById('play').textContent").startswith("Play")
        browser.press(" ")
        browser.until(f"{FRAME} !== {json.dumps(first)}")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(site: Path, dark: bool) -> None:
    latent = data(site)["latents"][0]
    with Browser(360, 740, dark=dark, touch=True) as browser:
        for page in (site / "index.html", site / "latents" / f"{latent:06d}.html"):
            browser.open(page)
            assert browser.js("document.documentElement.scrollWidth <= 360"), page
            assert browser.js("parseFloat(getComputedStyle(document.querySelector('.lead')).fontSize) >= 16")
            # Ink and paper differ enough to read (WCAG 2.2, 1.4.3: 4.5 to 1).
            assert browser.js(_CONTRAST) >= 4.5
        assert browser.problems == []


def test_every_image_and_control_has_a_name(site: Path, browser: Browser) -> None:
    for page in (site / "index.html", site / "latents" / f"{data(site)['latents'][0]:06d}.html"):
        browser.open(page)
        nameless = browser.js(
            "[...document.querySelectorAll('button, select, input, canvas, a')]"
            ".filter((node) => !node.closest('[hidden]')"
            " && node.getAttribute('aria-hidden') !== 'true'"
            " && !(node.getAttribute('aria-label') || node.textContent.trim()"
            " || (node.labels && [...node.labels].some((label) => label.textContent.trim()))))"
            ".map((node) => node.outerHTML)"
        )
        assert nameless == []
        assert browser.js("[...document.images].every((image) => image.hasAttribute('alt'))")
        assert browser.js("[...document.querySelectorAll('.cards img')].every((image) => image.alt.length > 20)")


_CONTRAST = """(() => {
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (color) => {
    const [r, g, b] = color.match(/\\d+/g).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll('.lead, .how, .note, a:not(.button):not(.skip)')].map((node) => {
    const ink = light(getComputedStyle(node).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  }));
})()"""
