"""The page of a report in a real browser, opened from the disk, mostly by keys alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from kontext_batch.storage.uris import file_path, file_uri
from tests.browser import open_report, prefer, resize, wait
from tests.unit.report.conftest import HOSTILE, OUT_OF_MEMORY
from tests.unit.report.made import Shop, many

LEFT, UP, RIGHT, DOWN, ENTER, ESCAPE, TAB, END = "\ue012\ue013\ue014\ue015\ue007\ue00c\ue004\ue010"


@pytest.fixture
def page(driver: Any, spring: Shop) -> Any:
    """The report, just opened."""
    resize(driver, 1280, 800)
    prefer(driver, color_scheme="light", reduced_motion="no-preference")
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    open_report(driver, spring.written.index)
    return driver


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.switch_to.active_element.send_keys(key)


def js(page: Any, expression: str, *arguments: Any) -> Any:
    return page.execute_script(f"return {expression}", *arguments)


def text(page: Any, selector: str) -> str:
    return str(js(page, "document.querySelector(arguments[0])?.textContent ?? ''", selector))


def current(page: Any) -> str:
    """What a screen reader says of the current picture."""
    grid = "document.getElementById('grid')"
    return str(js(page, f"document.getElementById({grid}.getAttribute('aria-activedescendant'))?.ariaLabel ?? ''"))


def opened(page: Any, title: str) -> None:
    """Wait until that picture is shown, with its steps."""
    wait(lambda: text(page, "#detail-title") == title and js(page, "!!document.querySelector('#detail[open] .step')"))
    wait(lambda: js(page, "!document.querySelector('.facts').hasAttribute('aria-busy')"))


def closed(page: Any) -> None:
    wait(lambda: not js(page, "document.querySelector('dialog[open]')"))


def loaded(page: Any, selector: str) -> None:
    wait(
        lambda: js(page, "document.querySelector(arguments[0])?.naturalWidth > 0", selector), f"{selector}: no picture"
    )


def complaints(page: Any) -> list[str]:
    return [each["message"] for each in page.get_log("browser")]


def requested(page: Any) -> set[str]:
    import json

    events = (json.loads(each["message"])["message"] for each in page.get_log("performance"))
    return {each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"}


def select(page: Any, label: str, option: str) -> None:
    js(
        page,
        """(() => {
            const label = [...document.querySelectorAll('#controls label')]
                .find((each) => each.firstChild.textContent === arguments[0]);
            const made = label.querySelector('select');
            made.value = [...made.options].find((each) => each.textContent === arguments[1]).value;
            made.dispatchEvent(new Event('change'));
        })()""",
        label,
        option,
    )


def test_it_opens_from_the_disk_and_asks_for_nothing_else(page: Any, spring: Shop) -> None:
    press(page, ENTER)
    opened(page, "mug · terrace · shop")
    for selector in (".grid img", ".stage .before", ".stage .after"):
        loaded(page, selector)
    assert complaints(page) == []
    asked = requested(page) - {"about:blank"}
    assert len(asked) > 10
    assert {each.startswith(spring.report) for each in asked} == {True}


def test_the_head_tells_how_the_run_ended(page: Any) -> None:
    told = text(page, "#head")
    for part in (
        "spring",
        "Finished with failures",
        "Run 1 for studio@acme.example",
        "27 done, 2 failed, 11 skipped",
        "15 of 24 delivered",
        "1 not delivered",
        "of 30 min",
        "3 failures",
    ):
        assert part in told, part
    assert js(page, "document.title") == "spring, run 1: Finished with failures"


def test_pictures_are_reached_and_opened_by_keys_alone(page: Any) -> None:
    assert js(page, "document.activeElement.id") == "grid"
    assert current(page) == "mug · terrace · shop: not delivered, no space left"
    press(page, RIGHT, DOWN)
    assert current(page) == "bag · snow · shop: skipped"
    press(page, LEFT, DOWN)
    assert current(page) == "RX-100 Größe 42 · terrace · shop: done"
    press(page, ENTER)
    opened(page, "RX-100 Größe 42 · terrace · shop")
    press(page, RIGHT)
    opened(page, "RX-100 Größe 42 · snow · shop")
    press(page, LEFT, LEFT)
    opened(page, "bag · podium · shop")
    press(page, ESCAPE)
    closed(page)
    assert js(page, "document.activeElement.id") == "grid"
    assert current(page) == "bag · podium · shop: done"
    press(page, END, "\ue008")  # Home and End keep to the row
    assert current(page).startswith("bag · podium")


def test_the_slider_is_moved_by_keys(page: Any) -> None:
    press(page, ENTER)
    opened(page, "mug · terrace · shop")
    for selector in (".stage .before", ".stage .after"):
        loaded(page, selector)
    cut = "getComputedStyle(document.querySelector('.stage .after')).clipPath"
    before = js(page, cut)
    page.find_element("css selector", ".slider").send_keys(RIGHT * 10)
    wait(lambda: js(page, "document.querySelector('.slider').value") == "60")
    assert js(page, cut) != before
    assert text(page, "#detail-title") == "mug · terrace · shop", "the arrows belong to the slider"
    assert js(page, "document.querySelector('.slider').ariaLabel") == "How much of mug.png is seen"
    assert js(page, "document.querySelector('.slider').ariaValueText") == "60 %"
    stage = js(page, "document.querySelector('.stage').getBoundingClientRect().width")
    line = js(page, "document.querySelector('.line').offsetLeft")
    assert line == pytest.approx(stage * 0.6, abs=2)


def seen(page: Any) -> str:
    """Which of both pictures shows while it blinks."""
    return str(
        js(
            page,
            "['before', 'after'].filter((each) => getComputedStyle(document.querySelector(`.stage .${each}`))"
            ".visibility === 'visible').join()",
        )
    )


def test_b_blinks_between_photo_and_result(page: Any) -> None:
    press(page, ENTER)
    opened(page, "mug · terrace · shop")
    press(page, "b")
    first = seen(page)
    assert first in ("before", "after")
    wait(lambda: seen(page) not in (first, ""), "it does not blink")
    press(page, "b")
    assert js(page, "document.querySelector('.stage').dataset.mode") == "slider"


def test_where_motion_is_not_wanted_it_blinks_by_hand(page: Any) -> None:
    prefer(page, reduced_motion="reduce")
    press(page, ENTER)
    opened(page, "mug · terrace · shop")
    js(page, "(window.timers = 0, window.setInterval = () => { window.timers += 1; })")
    press(page, "b")
    assert seen(page) == "before"
    press(page, "b")
    assert seen(page) == "after"
    assert js(page, "window.timers") == 0


def test_every_step_is_told_and_can_be_compared_with(page: Any) -> None:
    press(page, DOWN, ENTER)
    opened(page, "bag · terrace · shop")
    steps = js(page, "[...document.querySelectorAll('.chain h4')].map((each) => each.textContent.trim())")
    assert steps == ["Photo", "clean edit", "staged edit", "finish"]
    told = text(page, ".facts")
    for part in (
        "Remove the background.",
        "Change the background to a stone terrace.",
        "brand-look × 0.8",
        "1234",
        "96 × 64",
        "GPU time500 ms",
        "1 attempt",
    ):
        assert part in told, part
    assert js(page, "document.querySelector('.outputs a').href").endswith("/out/bag_terrace_shop.jpg")
    page.find_elements("css selector", "button.thumb")[1].send_keys(ENTER)
    wait(lambda: text(page, ".tag.left") == "clean")
    pressed = "[...document.querySelectorAll('button.thumb')].map((each) => each.getAttribute('aria-pressed'))"
    assert js(page, pressed) == ["false", "true", "false"]
    loaded(page, ".stage .before")


def test_what_is_looked_for_is_found(page: Any) -> None:
    press(page, "/")
    assert js(page, "document.activeElement.id") == "find"
    press(page, "GRÖSSE nothing")
    wait(lambda: text(page, "#told") == "0 of 12 pictures of finish")
    assert "Nothing here is like that" in text(page, "#empty")
    press(page, ESCAPE)
    wait(lambda: text(page, "#told") == "12 pictures of finish")
    press(page, "/", "deep snow", ENTER)
    wait(lambda: text(page, "#told") == "4 of 12 pictures of finish")
    press(page, "/", ESCAPE)
    select(page, "Step", "staged")
    press(page, "f")
    press(page, "PODIUM of ice", ENTER)
    wait(lambda: text(page, "#told") == "4 of 12 pictures of staged")
    assert js(page, "document.activeElement.id") == "grid"
    select(page, "State", "Skipped")
    wait(lambda: text(page, "#told") == "1 of 12 pictures of staged")
    assert current(page) == f"{HOSTILE} · podium: skipped"


def test_axes_are_chosen_for_rows_and_columns(page: Any) -> None:
    select(page, "channel", "hero")
    wait(lambda: current(page).startswith("mug · terrace · hero"))
    select(page, "Rows", "channel")
    columns = "[...document.querySelectorAll('.column')].map((each) => each.textContent)"
    rows = "[...document.querySelectorAll('.name')].map((each) => each.textContent)"
    assert js(page, rows) == ["shop", "hero"]
    assert js(page, columns) == ["terrace", "snow", "podium"]
    select(page, "item", "bag")
    assert current(page) == "bag · terrace · shop: done"
    select(page, "Rows", "none")
    wait(lambda: text(page, "#told") == "6 pictures of finish")
    select(page, "item", "all")
    wait(lambda: text(page, "#told") == "24 pictures of finish")
    assert text(page, ".caption") == "mug · terrace · shop"


def test_an_address_keeps_the_place(page: Any) -> None:
    select(page, "channel", "hero")
    press(page, "\ue010", ENTER)
    opened(page, "mug · podium · hero")
    kept = page.current_url
    open_report(page, kept)
    opened(page, "mug · podium · hero")
    press(page, ESCAPE)
    closed(page)
    assert current(page) == "mug · podium · hero: done"
    press(page, ENTER)
    opened(page, "mug · podium · hero")
    page.back()
    closed(page)
    page.forward()
    opened(page, "mug · podium · hero")
    for odd in ("#open=99999", "#step=nothing&rows=x&.channel=y&size=-3", "#%E0%A4%A"):
        open_report(page, page.current_url.partition("#")[0] + odd)
        assert current(page).startswith("mug · terrace · shop")
    assert complaints(page) == []


def test_failures_are_listed_with_their_reasons_and_lead_to_the_step(page: Any) -> None:
    page.find_element("css selector", ".failures").send_keys(ENTER)
    told = js(page, "[...document.querySelectorAll('.problem')].map((each) => each.innerText.split('\\n'))")
    assert told == [
        ["finish mug · terrace · shop", "no space left"],
        ["staged bag · snow", OUT_OF_MEMORY],
        [f"clean {HOSTILE}", f"damaged: {HOSTILE}"],
    ]
    page.find_elements("css selector", ".problem")[1].send_keys(ENTER)
    opened(page, "bag · snow")
    assert text(page, ".nothing") == OUT_OF_MEMORY
    assert js(page, "document.querySelector('details[open] .error') !== null"), "attempts that failed are shown"


def test_no_text_is_read_as_markup(page: Any) -> None:
    press(page, DOWN, DOWN, DOWN, ENTER)
    opened(page, f"{HOSTILE} · terrace · shop")
    assert f"damaged: {HOSTILE}" in text(page, ".facts")
    assert not js(page, "document.querySelector('[onerror]')")
    assert not js(page, "window.hit")
    page.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", HOSTILE)
    wait(lambda: any("Content Security Policy" in each for each in complaints(page)), "nothing guards the page")
    assert not js(page, "window.hit")


def test_keys_are_explained(page: Any) -> None:
    press(page, "?")
    assert "blink between photo and result" in text(page, "#help")
    press(page, ESCAPE)
    closed(page)
    before = js(page, "document.querySelector('.cell').offsetWidth")
    press(page, "-")
    assert js(page, "document.querySelector('.cell').offsetWidth") < before


def test_a_file_that_is_not_there_is_told(page: Any, spring: Shop) -> None:
    details = next(Path(spring.folder, "report", "data").glob("details-*"))
    aside = details.rename(details.with_suffix(".aside"))
    try:
        open_report(page, spring.written.index)
        press(page, ENTER)
        wait(lambda: "cannot be loaded; is it still beside this page?" in text(page, ".facts"))
    finally:
        aside.rename(details)
    press(page, RIGHT)
    opened(page, "mug · snow · shop")


CONTRAST = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((each) => each / 255)
    .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4))
    .reduce((sum, each, at) => sum + each * [0.2126, 0.7152, 0.0722][at], 0);
const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
        const colour = numbers(getComputedStyle(at).backgroundColor);
        if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
};
const top = document.querySelector("dialog[open]") ?? document.body;
const bad = [];
for (const element of top.querySelectorAll("*")) {
    const own = [...element.childNodes].some((each) => each.nodeType === 3 && each.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("option, noscript, :disabled, .unseen")) continue;
    const [one, other] = [light(numbers(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) bad.push(`${element.className || element.tagName} ${element.textContent.slice(0, 20)}: ${ratio}`);
}
return bad;
"""
NAMES = """
const top = document.querySelector("dialog[open]") ?? document.body;
return [...top.querySelectorAll("button, select, input, a[href], [role=grid], [role=region], summary")]
    .filter((each) => each.checkVisibility());
"""
STRUCTURE = """
const bad = [];
const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
if (new Set(ids).size !== ids.length) bad.push("two elements have one id");
for (const each of document.querySelectorAll("img:not([alt])")) bad.push("a picture without alt");
for (const each of document.querySelectorAll("[role=row] > *")) {
    if (!/^(gridcell|columnheader|rowheader)$/.test(each.getAttribute("role"))) bad.push(`${each.className} in a row`);
}
for (const each of document.querySelectorAll("[aria-labelledby]")) {
    if (each.open && !document.getElementById(each.getAttribute("aria-labelledby"))) bad.push(`${each.id} has no name`);
}
const heads = [...(document.querySelector("dialog[open]") ?? document.body).querySelectorAll("h1, h2, h3, h4")]
    .filter((each) => each.checkVisibility()).map((each) => Number(each.tagName[1]));
heads.forEach((level, at) => { if (at && level > heads[at - 1] + 1) bad.push(`h${level} after h${heads[at - 1]}`); });
if (!document.documentElement.lang) bad.push("no language");
return bad;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_has_a_name(page: Any, scheme: str) -> None:
    prefer(page, color_scheme=scheme)

    def check() -> None:
        assert page.execute_script(CONTRAST) == []
        assert page.execute_script(STRUCTURE) == []
        named = page.execute_script(NAMES)
        assert named
        assert [each.get_attribute("outerHTML") for each in named if not each.accessible_name] == []

    check()
    press(page, ENTER)
    opened(page, "mug · terrace · shop")
    check()
    press(page, RIGHT, RIGHT, RIGHT, RIGHT)
    opened(page, "bag · snow · shop")
    check()
    press(page, ESCAPE, "?")
    check()
    press(page, ESCAPE)
    page.find_element("css selector", ".failures").send_keys(ENTER)
    check()
    press(page, ESCAPE)
    select(page, "Rows", "none")
    check()


FOCUSED = """
const at = document.activeElement;
const style = getComputedStyle(at);
const shown = at.id === "grid" ? getComputedStyle(document.querySelector(".cell.active")) : style;
const ring = at.className === "slider" ? getComputedStyle(document.querySelector(".line"), "::after") : null;
return [at.tagName, at.ariaLabel ?? at.textContent.slice(0, 30),
    shown.outlineStyle !== "none" && parseFloat(shown.outlineWidth) >= 2 || Boolean(ring?.boxShadow.includes("5px"))];
"""


def test_tab_goes_through_all_of_it_and_shows_where_it_is(page: Any) -> None:
    stops = []
    for _ in range(12):
        stops.append(tuple(page.execute_script(FOCUSED)))
        press(page, TAB)
        if js(page, "document.activeElement === document.body"):
            press(page, TAB)
    assert {stop[0] for stop in stops} >= {"DIV", "BUTTON", "SELECT", "INPUT"}
    assert [stop for stop in stops if not stop[2]] == []
    page.find_element("id", "grid").send_keys(ENTER)
    opened(page, "mug · terrace · shop")
    inside = []
    for _ in range(16):
        press(page, TAB)
        if js(page, "!!document.activeElement.closest('#detail')"):
            inside.append(tuple(page.execute_script(FOCUSED)))
    assert any(stop[1].startswith("How much of") for stop in inside)
    assert any(stop[1] == "Compare with clean" for stop in inside)
    assert [stop for stop in inside if not stop[2]] == []


def test_it_fits_a_narrow_window(page: Any) -> None:
    resize(page, 390, 800)
    wide = "document.documentElement.scrollWidth"
    assert js(page, wide) <= 390
    assert js(page, "document.getElementById('grid').clientHeight") > 400
    press(page, ENTER)
    opened(page, "mug · terrace · shop")
    assert js(page, wide) <= 390
    assert js(page, "document.querySelector('.stage').clientHeight") > 200
    assert js(page, "document.querySelector('.facts').clientHeight") > 200


def test_a_low_window_leaves_room_for_the_pictures(page: Any) -> None:
    """As of a page of 1280 x 1024 that is enlarged four times."""
    resize(page, 320, 256)
    assert js(page, "document.getElementById('grid').clientHeight") > 200
    assert js(page, "document.getElementById('controls').clientHeight") > 50
    press(page, DOWN)
    wait(lambda: abs(js(page, "document.getElementById('grid').getBoundingClientRect().top")) < 2)


def test_what_a_run_that_has_ended_did_not_bring_is_not_promised(page: Any) -> None:
    select(page, "State", "Skipped")
    page.find_element("id", "grid").send_keys(ENTER)
    opened(page, "bag · snow · shop")
    assert text(page, ".outputs .soft") == "Not delivered: "
    assert "as it stood" not in text(page, ".who")


def test_a_run_that_goes_on_says_when_it_stood_so(driver: Any, tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop", ["mug"], {"snow": "deep snow"}, ["shop"]).submit().work(most=1)
    open_report(driver, shop.writer().write(shop.run_id, shop.report, shop.store).index)
    assert ", as it stood " in text(driver, ".who")
    driver.find_element("id", "grid").send_keys(ENTER)
    opened(driver, "mug · snow · shop")
    assert text(driver, ".outputs .soft") == "To be delivered: "
    assert text(driver, ".nothing:not(.bad)") == "Not made yet."


def test_a_picture_that_was_not_copied_along_is_told(driver: Any, spring: Shop, tmp_path: Path) -> None:
    shutil.copytree(Path(file_path(spring.report)), tmp_path / "report")
    for preview in (tmp_path / "report" / "pictures").glob("*-m.webp"):
        preview.unlink()
    open_report(driver, file_uri(tmp_path / "report" / "index.html"))
    driver.find_element("id", "grid").send_keys(ENTER)
    opened(driver, "mug · terrace · shop")
    wait(lambda: text(driver, ".nothing.bad:not([hidden])").startswith("A picture of this report is not"))


@pytest.fixture(scope="module")
def thousands(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return many(tmp_path_factory.mktemp("large"), products=250, scenes=20)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_five_thousand_pictures_can_be_used(driver: Any, thousands: Shop) -> None:
    resize(driver, 1280, 800)
    open_report(driver, thousands.written.index)
    count = "[document.querySelectorAll('*').length, document.querySelectorAll('.grid img').length]"

    def bounded() -> None:
        nodes, images = js(driver, count)
        assert images < 150
        assert nodes < 1200

    assert text(driver, "#told") == "5,000 pictures of finish"
    bounded()
    press(driver, "\ue009\ue010")  # Ctrl and End
    wait(lambda: current(driver) == "item-249 · scene-19 · shop: done")
    bounded()
    js(driver, "(document.getElementById('grid').scrollTop = 12000)")
    wait(lambda: js(driver, "document.elementFromPoint(600, 600)?.closest('.cell') !== null"), "nothing is drawn")
    bounded()
    select(driver, "Rows", "none")
    wait(lambda: text(driver, "#told") == "5,000 pictures of finish")
    bounded()
    press(driver, "/")
    press(driver, "item-249 place")
    wait(lambda: text(driver, "#told") == "0 of 5,000 pictures of finish")
    press(driver, ESCAPE, "/")
    press(driver, "item-249", ENTER)
    wait(lambda: text(driver, "#told") == "20 of 5,000 pictures of finish")
    press(driver, ENTER)
    opened(driver, "item-249 · scene-00 · shop")
