"""report.html in Debian's Chromium (`apt-get install chromium fonts-noto-core fonts-noto-cjk`), from disk and
with the network off.

Screenshots of both widths and both themes are left in MONOSEMY_SHOTS, where that names a folder.
"""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from monosemy.report import page as report
from tests.made_run import HOSTILE, make

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports") / "made"
    folder.mkdir()
    rows = make(folder)
    return report.write([folder]), rows


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page with what it asked for and complained of."""

    def __init__(self, browser, path, route="#/", width=1280, scheme="light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        self.page = self.context.new_page()
        self.path, self.asked, self.complaints = path, [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.go(route)

    def go(self, route):
        self.page.goto(f"file://{self.path}{route}")
        self.page.wait_for_selector("html[data-ready]")
        self.page.wait_for_timeout(300)

    def check(self):
        assert not self.complaints and {url.split("#")[0] for url in self.asked} == {f"file://{self.path}"}
        self.context.close()


@pytest.fixture
def opened(browser, made):
    opened = Opened(browser, made[0])
    yield opened
    opened.check()


def sae(rows, number):
    return f"#/sae/made/{rows[number]['sae']}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_is_quiet(browser, made, width, scheme):
    path, rows = made
    here = Opened(browser, path, width=width, scheme=scheme)
    latent = latents_of(path, rows, 5)[0]
    for name, route in (
        ("overview", "#/"),
        ("sae", sae(rows, 5)),
        ("latent", f"{sae(rows, 5)}/latent/{latent}"),
        ("about", "#/about"),
    ):
        here.go(route)
        assert here.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, route
        small = """[...document.querySelectorAll("main:not([hidden]) *")].filter(e => e.childNodes.length
            && [...e.childNodes].some(c => c.nodeType === 3 && c.data.trim()) && e.checkVisibility()
            && parseFloat(getComputedStyle(e).fontSize) < (e.className === "control" ? 11 : 12))
            .map(e => e.outerHTML)"""
        assert here.page.evaluate(small) == [], route
        if folder := os.environ.get("MONOSEMY_SHOTS"):
            here.page.screenshot(path=Path(folder) / f"{name}_{width}_{scheme}.png", full_page=True)
    here.check()


def latents_of(path, rows, number):
    import numpy as np

    with np.load(path.parent / rows[number]["sae"] / "latents.npz") as file:
        return file["page_latent"].tolist()


def cells(page, key):
    return page.eval_on_selector_all(
        f'#saes tbody tr:not([hidden]) td[data-key="{key}"]', "all => all.map(e => e.textContent.trim())"
    )


def test_every_column_sorts_both_ways(opened, made):
    page, rows = opened.page, made[1]
    for head in page.query_selector_all("#saes thead th[data-key]"):
        key = head.get_attribute("data-key")
        for way, falling in (("ascending", False), ("descending", True)):
            head.query_selector("button").click()
            assert head.get_attribute("aria-sort") == way
            order = [
                int(n)
                for n in page.eval_on_selector_all("#saes tbody tr", "all => all.map(e => e.dataset.number)")
            ]
            if key:
                held = [rows[n][key] for n in order if rows[n][key] is not None]
                assert held == sorted(held, reverse=falling) and all(
                    rows[n][key] is None for n in order[len(held) :]
                )
            else:
                assert order == sorted(order, reverse=falling)


def points(page):
    return page.eval_on_selector_all(
        '#pareto [role="link"]', "all => all.map(e => e.getAttribute('aria-label'))"
    )


def test_filters_hold_for_plot_and_table_alike(opened, made):
    page, rows = opened.page, made[1]
    assert len(points(page)) == len(rows)
    page.click('#filters button:has-text("top_k") >> nth=0')
    page.wait_for_timeout(300)
    assert len(points(page)) == len(cells(page, "l0")) == 14 and page.inner_text("#count") == "14 of 16"
    page.select_option("#filters select", "resid_post.1")
    page.wait_for_timeout(300)
    assert len(points(page)) == len(cells(page, "l0")) == 7
    page.fill("#filters input", "gated")
    page.wait_for_timeout(300)
    assert len(points(page)) == len(cells(page, "l0")) == 1
    page.select_option("#axes select >> nth=0", "kl")
    page.wait_for_timeout(300)
    assert "KL" in points(page)[0]


def test_what_was_chosen_is_in_the_address(browser, made):
    here = Opened(browser, made[0])
    page, rows = here.page, made[1]
    assert page.evaluate("location.hash") in ("", "#/")
    page.click('#filters button:has-text("top_k") >> nth=0')
    page.select_option("#axes select >> nth=0", "kl")
    page.fill("#filters input", "top")
    page.click('#saes thead th[data-key="kl"] button')
    page.click('#saes thead th[data-key="kl"] button')
    page.wait_for_timeout(300)
    view = [points(page), cells(page, "kl"), page.inner_text("#count")]
    address = page.evaluate("location.hash")
    assert 0 < len(view[0]) < len(rows) and "KL" in view[0][0] and "sort=kl" in address
    page.click("#saes tbody tr:not([hidden]) a")
    page.wait_for_selector("#view h1")
    page.go_back()
    page.wait_for_selector("#overview:not([hidden])")
    assert page.evaluate("location.hash") == address
    here.check()

    for route, chosen in (
        (address, True),
        (f"{sae(rows, 5)}", False),
        ("#/?x=no&site=no&off=no&sort=no&run=7", False),
    ):
        again = Opened(browser, made[0], route)
        if route.startswith("#/sae"):
            assert again.page.evaluate("location.hash") == route
            again.page.click("#trail a")
            again.page.wait_for_timeout(300)
        seen = [points(again.page), cells(again.page, "kl"), again.page.inner_text("#count")]
        assert seen == view if chosen else seen[2] == "16"
        if chosen:
            assert again.page.input_value("#filters input") == "top"
            assert (
                again.page.get_attribute('#filters button:has-text("top_k") >> nth=0', "aria-pressed")
                == "false"
            )
            assert again.page.get_attribute('#saes thead th[data-key="kl"]', "aria-sort") == "descending"
        again.check()


def test_points_say_what_the_rows_say(opened, made):
    page, rows = opened.page, made[1]
    said = points(page)
    for row in rows:
        low, high = row["loss_recovered_zero_low"], row["loss_recovered_zero_high"]
        interval = "" if low is None else f" [{low:.4f}, {high:.4f}]"
        start = f"{row['architecture']}, {row['site']}, {row['d_sae']} latents, k 40: "
        assert f"{start}L0 {row['l0']:.1f}, Loss recovered {row['loss_recovered_zero']:.4f}{interval}" in said


def test_a_point_opens_its_sae_by_mouse_and_by_keyboard(opened, made):
    page, rows = opened.page, made[1]
    point = page.query_selector_all('#pareto [role="link"]')[3]
    number = int(point.get_attribute("data-sae"))
    box = point.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#view:not([hidden]) h1")
    assert page.evaluate("location.hash") == sae(rows, number)
    assert page.inner_text("#view h1") == f"{rows[number]['architecture']}, {rows[number]['site']}"
    page.go_back()
    page.wait_for_selector("#overview:not([hidden])")
    page.focus(f'#pareto [data-sae="{number}"]')
    assert page.is_visible("#card") and rows[number]["architecture"] in page.inner_text("#card")
    page.keyboard.press("Enter")
    page.wait_for_selector("#view:not([hidden]) h1")
    assert page.evaluate("location.hash") == sae(rows, number)


def test_latents_are_listed_searched_and_opened(opened, made):
    import numpy as np

    page, (path, rows) = opened.page, made
    with np.load(path.parent / rows[5]["sae"] / "latents.npz") as file:
        latents = {name: file[name] for name in file.files}
    opened.go(sae(rows, 5))

    def listed():
        return [
            int(n)
            for n in page.eval_on_selector_all(
                "#latents tbody tr td:first-child", "all => all.map(e => e.textContent)"
            )
        ]

    page.click('#latents button:has-text("all 64")')
    assert len(listed()) == 50
    page.click('#latents button:has-text("fires on")')
    assert latents["count"][listed()].tolist() == sorted(latents["count"].tolist(), reverse=True)[:50]
    page.fill("#search", "freq:>0.05 max:<1")
    share = latents["count"] / rows[5]["tokens"]
    assert sorted(listed()) == np.flatnonzero((share >= 0.05) & (latents["max"] <= 1)).tolist()
    page.fill("#search", 'token:"word7"')
    assert set(listed()) <= {
        i for i, token in enumerate(latents["peak_token"]) if token >= 13 and f"{token - 13}".startswith("7")
    }
    latent = int(latents["page_latent"][0])
    page.fill("#search", str(latent))
    assert listed() == [latent]
    page.click("#latents tbody a")
    page.wait_for_selector("#view h1:has-text('Latent')")
    assert page.evaluate("location.hash") == f"{sae(rows, 5)}/latent/{latent}"
    shown = page.inner_text("#view")
    assert f"{latents['count'][latent]:,} of {rows[5]['tokens']:,}" in page.get_attribute(
        ".tiles div", "title"
    )
    assert (
        f"+{latents['page_promotes_z'][0, 0]:.1f}" in shown and f"{latents['enc_dec'][latent]:.2f}" in shown
    )
    page.go_back()
    page.wait_for_selector("#search")
    assert page.input_value("#search") == str(latent)


def test_one_walks_through_a_list_by_keys(opened, made):
    page, rows = opened.page, made[1]
    opened.go(sae(rows, 5))
    page.click('#latents button:has-text("dense")')
    first, second = page.eval_on_selector_all(
        "#latents tbody tr td:first-child", "all => all.map(e => e.textContent)"
    )[:2]
    page.click("#latents tbody a")
    page.wait_for_selector("h1:has-text('Latent')")
    page.keyboard.press("]")
    page.wait_for_selector(f"h1:has-text('Latent {second}')")
    page.keyboard.press("[")
    page.wait_for_selector(f"h1:has-text('Latent {first}')")
    page.focus(".tokens bdi.peak")
    assert page.is_visible("#card") and "activation" in page.inner_text("#card")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.tagName") == "BDI"
    page.keyboard.press("Escape")
    assert not page.is_visible("#card")


def test_hostile_text_stays_text(opened, made):
    page, (path, rows) = opened.page, made
    seen = ""
    for latent in latents_of(path, rows, 5):
        opened.go(f"{sae(rows, 5)}/latent/{latent}")
        assert page.title() == "made - monosemy"
        assert (
            page.evaluate("document.querySelectorAll('#view :is(script, img, iframe, b script)').length") == 0
        )
        seen += page.inner_text("#view")
    for word in (*(w.decode() for w in HOSTILE[:4]), "⟨e2 80⟩", "RLO", "ZWSP", "LRI", "␀␛␡", "↵⇥"):
        assert word in seen, word


def test_empty_states_say_what_is_missing(opened, made):
    page, (path, rows) = opened.page, made
    without = next(latent for latent in range(3, 64) if latent not in latents_of(path, rows, 5))
    opened.go(f"{sae(rows, 5)}/latent/{without}")
    assert "has no page" in page.inner_text("#view")
    opened.go(f"{sae(rows, 5)}/latent/1")
    assert "Never fired" in page.inner_text("#view")
    opened.go(f"{sae(rows, 5)}/latent/99999")
    assert "latents 0 to 63" in page.inner_text("#view")
    opened.go("#/sae/made/none")
    assert "No such SAE" in page.inner_text("#view")


def test_the_table_reads_without_script(browser, made):
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(f"file://{made[0]}")
    assert len(cells_without(page)) == 16 and "need JavaScript" in page.inner_text("body")
    context.close()


def cells_without(page):
    return page.query_selector_all("#saes tbody tr:visible")


def test_a_damaged_block_leaves_the_rest(browser, made, tmp_path):
    text = made[0].read_text()
    cut = re.sub(r'(id="block-sae5">)[^<]{200}', r"\1", text)
    (tmp_path / "cut.html").write_text(cut)
    here = Opened(browser, tmp_path / "cut.html", sae(made[1], 5))
    assert "cannot be read" in here.page.inner_text("#view")
    here.go(sae(made[1], 6))
    assert here.page.query_selector_all("#latents tbody tr")
    here.context.close()


def test_printing_has_every_row(opened, tmp_path):
    opened.page.emulate_media(media="print")
    assert len(cells_without(opened.page)) == 16
    assert len(opened.page.pdf()) > 10_000


def test_two_dozen_wide_saes_fit_and_open_quickly(browser, tmp_path):
    folder = tmp_path / "wide"
    folder.mkdir()
    rows = make(folder, sites=3, width=16384, pages=1000, contexts=8000, L=128)
    path = report.write([folder])
    assert len(rows) == 24 and path.stat().st_size < 15_000_000
    began = time.monotonic()
    here = Opened(browser, path)
    ready = time.monotonic() - began
    here.go(f"#/sae/wide/{rows[20]['sae']}")
    kept = int(re.search(r"([\d,]+) have a page", here.page.inner_text("#latents"))[1].replace(",", ""))
    began = time.monotonic()
    here.page.click("#latents tbody a")
    here.page.wait_for_selector("h1:has-text('Latent')")
    latent = time.monotonic() - began
    heap = here.page.evaluate("performance.memory.usedJSHeapSize")
    print(
        f"{path.stat().st_size:,} bytes, ready {ready:.1f} s, latent {latent:.2f} s, heap {heap:,}, {kept} "
        "pages an SAE"
    )
    assert kept >= 500 and ready < 15 and latent < 3 and heap < 150_000_000
    here.check()


def test_a_panel_that_cannot_be_drawn_costs_no_other(browser, made, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(made[0].read_text().replace(report._library(), ""))
    here = Opened(browser, path)
    told = here.page.locator(".note", has_text="This panel cannot be drawn")
    assert told.count() >= 4  # the points, the curves, the frequencies
    assert here.page.locator("#alive .bars").is_visible() and here.page.locator(
        "#saes tbody tr:visible"
    ).count() == len(made[1])
    here.go(sae(made[1], 5))
    assert here.page.locator("#latents tbody tr").count() and told.count()
    here.check()


def test_a_report_of_activations_that_are_no_text_s(browser, tmp_path):
    import torch

    import monosemy

    x_ND = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    spec = monosemy.SAESpec("top_k", d_sae=16, settings={"k": 2})
    path = monosemy.write_report(
        tmp_path / "own", monosemy.fit(x_ND.split(100), [spec], log_steps=5), [x_ND], site="a simulator"
    )
    here = Opened(browser, path)
    assert "Evaluated on 2,000 held-out rows" in here.page.inner_text("#overview")
    here.go("#/sae/own/sae_0")
    assert "contexts" not in here.page.inner_text("#latents thead").lower()
    here.page.locator("#latents tbody tr a").first.click()
    here.page.wait_for_selector("text=Strongest rows")
    assert "of rows" in here.page.inner_text("#view") and "without text" not in here.page.inner_text("#view")
    here.check()
