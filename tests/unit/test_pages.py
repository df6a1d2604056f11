"""Pages in a real browser: nothing asked for, nothing spilled, readable by everyone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vramplan.catalogue import find_model
from vramplan.cli.compare import form
from vramplan.comparing import compare
from vramplan.job import Job
from vramplan.record import read_record
from vramplan.report.page import Page, Table, to_html
from vramplan.resources import profiles_dir

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
pytest.importorskip("matplotlib")
RUNS = profiles_dir() / "calibrations" / "h100-sxm-80gb" / "runs"
NAME = "<script>alert(1)</script>\"'\n🚀 a-name-that-is-much-longer-than-any-column-of-a-telephone"
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    system = next(
        (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))),
        None,
    )
    with playwright.sync_playwright() as driver:
        try:
            found = driver.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser to look with: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of page, with names that nobody should choose."""
    folder = tmp_path_factory.mktemp("pages")
    odd = replace(find_model("pythia-70m"), name=NAME)
    cards = ["3060", "t4", "v100-32gb", "3090", "a100-80gb", "h100-sxm-80gb", "l4", "a10g"]
    jobs = [Job(method=method) for method in ("qlora", "lora", "full")]
    records = [read_record(path) for path in sorted(RUNS.glob("gpt-j-6b-*.json"))]
    records.append(records[0].model_copy(update={"name": NAME}))
    plain = Page("A page", "Words", (Table("", ("a", "b"), (("x", "1"), ("y", "2"), ("z", "3"))),))
    texts = {
        "cards": form(compare([odd, "gpt-j-6b", "llama-3.1-8b"], cards, jobs), ".html"),
        "runs": form(compare(records=records), ".html"),
        "plain": to_html(plain),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("name", ["cards", "runs", "plain"])
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_page(browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    view = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(pages[name].as_uri())
    root = "document.documentElement"
    spilled = view.evaluate(f"{root}.scrollWidth - {root}.clientWidth")
    small = view.evaluate(
        "[...document.querySelectorAll('svg text')]"
        ".map(t => t.getBoundingClientRect().height).filter(h => h && h < 8)"
    )
    problems = [
        f"{found['id']}: {found['nodes'][0]['html']}"
        for found in axe.Axe().run(view).response["violations"]
        if found["impact"] in ("serious", "critical")
    ]
    context.close()
    assert said == [] and asked == [pages[name].as_uri()]
    assert spilled == 0 and small == [] and problems == []


def test_it_reads_without_script(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    view = context.new_page()
    view.goto(pages["cards"].as_uri())
    assert "fits" in view.inner_text("table") and view.locator("svg").count() == 4
    assert view.locator("thead button").count() == 0
    context.close()


def test_the_keyboard_sorts(browser: Any, pages: dict[str, Path]) -> None:
    view = browser.new_page()
    view.goto(pages["plain"].as_uri())
    view.locator("thead button").nth(1).focus()
    order = []
    for _ in range(2):
        view.keyboard.press("Enter")
        order.append(view.locator("tbody th").all_inner_texts())
    assert order == [["x", "y", "z"], ["z", "y", "x"]]
    assert view.locator("th[aria-sort=descending]").count() == 1
    view.close()


def test_shortages_sort_below_what_is_to_spare(browser: Any, pages: dict[str, Path]) -> None:
    view = browser.new_page()
    view.goto(pages["cards"].as_uri())
    view.locator("thead button").nth(1).click()
    cells = view.locator("table").first.locator("tbody tr td:nth-child(2)").all_inner_texts()
    spare = [float(cell.split()[-1].replace("\u2212", "-").replace(",", "")) for cell in cells]
    assert spare == sorted(spare) and spare[0] < 0 < spare[-1]
    view.close()
