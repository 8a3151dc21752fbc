"""Prefect's UI in a real browser, used as a person does: the form, a run, what it shows, and values that are wrong."""

from __future__ import annotations

import re
from typing import Any

from playwright.sync_api import Locator, Page, expect

from tests.ui.conftest import Picture

expect.set_options(timeout=60_000)  # milliseconds; the machine may be busy
RUN = 400_000.0  # milliseconds; a run takes about a minute on two idle cores


def test_the_form_is_drawn_from_the_models_with_choices_and_sections_that_open(page: Page, picture: Picture) -> None:
    form = open_form(page, "curate", picture)
    picture("form")

    source = field(form, "Source")
    expect(source).to_contain_text("File, folder, glob, s3:// URL, or data set name on the Hugging Face hub.")
    expect(source.get_by_role("textbox")).to_have_value(".prefsieve/tinyworld/prompts.jsonl")
    expect(field(form, "Samples")).to_contain_text("Completions per prompt and generator.")
    expect(field(form, "Samples").get_by_role("spinbutton")).to_have_value("8")
    titles = form.locator(".schema-form-property__label").all_inner_texts()
    told = (
        "Prompts (ingest)",
        "Completions (generate)",
        "Rewards (score)",
        "Pairs (pair)",
        "Subsets to publish (subset)",
    )
    places = [[title.removesuffix(" (Optional)") for title in titles].index(section) for section in told]
    assert places == sorted(places)
    expect(form.locator(".p-code-input")).to_have_count(0)  # boxes for JSON
    expect(form.get_by_text("None", exact=True)).to_have_count(0)

    engine = field(form, "Engine")
    engine.locator(".p-select-button__icon").click()  # beside the arrows, a click opens and closes it, for people too
    for choice in ("vllm", "fake"):
        expect(page.get_by_role("option", name=choice, exact=True)).to_be_visible()
    page.keyboard.press("Escape")

    judge = field(form, "Judge")
    expect(judge).to_contain_text("Defaults: mode = pointwise")
    expect(field(judge, "Base URL")).to_have_count(0)
    judge.get_by_role("button", name="Judge", exact=True).click()
    expect(field(judge, "Mode")).to_contain_text("pointwise")
    picture("section")
    judge.get_by_role("button", name="Defaults", exact=True).first.click()
    expect(field(judge, "Base URL")).to_have_count(0)

    more = field(form, "More settings", 1)  # of the first generator
    expect(more).to_contain_text("workers, max workers, CPUs, GPUs")
    more.get_by_role("button", name="More", exact=True).click()
    expect(field(more, "Workers").get_by_role("spinbutton")).to_have_value("1")


def test_two_changed_fields_make_a_run_that_completes_and_shows_them_in_its_artifacts(
    page: Page, picture: Picture, local_ray: Any
) -> None:
    form = open_form(page, "curate")
    # A Ray that runs already: one that starts beside a server, a worker and a browser may take longer than Ray waits.
    field(form, "Ray address").get_by_role("textbox").fill(local_ray.get_runtime_context().gcs_address)
    field(form, "Limit").get_by_role("spinbutton").fill("200")
    field(form, "Samples").get_by_role("spinbutton").fill("4")
    field(form, "Fraction").get_by_role("spinbutton").fill("0.5")  # of the first subset
    submit(page)
    page.get_by_text("Task Runs", exact=True).click()
    ended = state(page, "Completed").or_(state(page, "Failed"))
    expect(page.get_by_role("link", name="generate", exact=True).or_(ended).first).to_be_visible(timeout=RUN)
    picture("run")
    expect(ended).to_be_visible(timeout=RUN)
    expect(state(page, "Completed")).to_be_visible(timeout=1)

    page.get_by_text("Artifacts", exact=True).click()
    expect(page.get_by_text("curate-report", exact=True)).to_be_visible()
    picture("artifacts")
    open_artifact(page, "generate-progress")
    expect(page.get_by_text("100%")).to_be_visible()
    open_artifact(page, "curate-counts")
    for row in ("ingest 200 200 none", "score 4800 4800 none"):  # 200 prompts x 4 samples x 3 models x 2 scorers
        expect(page.locator("tr", has_text=re.compile(row.replace(" ", r"\s*")))).to_be_visible()
    expect(page.get_by_text("outside the top 50 % by pvar")).to_be_visible()
    picture("counts")
    open_artifact(page, "curate-report")
    expect(page.get_by_text("the top 50 % by pvar").first).to_be_visible()
    expect(page.get_by_text("the bottom control of nightly (the top 50 % by pvar)").first).to_be_visible()
    picture("report")


def test_a_value_out_of_bounds_is_refused_beside_its_field_and_nothing_runs(page: Page, picture: Picture) -> None:
    form = open_form(page, "curate")
    samples, fraction, name = field(form, "Samples"), field(form, "Fraction"), field(form, "Name", 1)
    samples.get_by_role("spinbutton").fill("0")
    fraction.get_by_role("spinbutton").fill("1.5")
    name.get_by_role("textbox").fill("my model")
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(samples).to_contain_text("0 is less than the minimum of 1")
    expect(fraction).to_contain_text("1.5 is greater than the maximum of 1")
    expect(name).to_contain_text("'my model' does not match")
    expect(name).to_contain_text("Letters, digits, dots, dashes and underscores.")
    samples.scroll_into_view_if_needed()
    picture("refused")
    samples.get_by_role("spinbutton").fill("4")
    expect(samples).not_to_contain_text("minimum")
    expect(page.get_by_role("button", name="View run")).to_have_count(0)
    assert page.url.split("?")[0].endswith("/run"), "the form is still there"


def test_values_that_do_not_go_together_are_refused_by_the_run_in_words(page: Page, picture: Picture) -> None:
    """Only the models know, so the run ends before anything is started."""
    form = open_form(page, "curate")
    field(field(form, "Subsets to publish (subset)"), "Pairs").get_by_role("textbox").fill("on-polcy")
    submit(page)
    expect(state(page, "Failed")).to_be_visible(timeout=RUN)
    page.get_by_text("Details", exact=True).click()
    page.get_by_text("See More").click()
    expect(
        page.get_by_text(re.compile("ConfigError: subset 'nightly': pairs: 'on-polcy' is not one of on-policy,")).last
    ).to_be_visible()
    picture("failed")


# --- where things are


def open_form(page: Page, deployment: str, picture: Picture = lambda name: None) -> Locator:
    """From the first page to the form of a run with other parameters."""
    page.get_by_role("button", name="Deployments", exact=True).click()
    page.locator("a[href^='/deployments/deployment/']").get_by_text(deployment, exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.get_by_text("Custom run")).to_be_visible()
    picture("deployment")
    page.get_by_text("Custom run").click()
    form = page.locator("form")
    expect(field(form, "Store")).to_be_visible()
    return form


def field(within: Locator, title: str, number: int = 0) -> Locator:
    """A field with its description, input and message; of several with this title, that of the number.

    By the title's text: the UI does not tell a browser which input a label is for.
    """
    words = re.compile(rf"^{re.escape(title)}( \(Optional\))?$")
    label = within.locator(".schema-form-property__label", has_text=words).nth(number)
    return label.locator("xpath=ancestor::div[contains(concat(' ', @class, ' '), ' schema-form-property ')][1]")


def submit(page: Page) -> None:
    """Start the run and go to its page. SQLite is locked now and then on a busy machine: a person tries again."""
    started, failed = page.get_by_role("button", name="View run"), page.get_by_text("Oops. Something went wrong.").first
    for _ in range(5):
        page.get_by_role("button", name="Submit", exact=True).click()
        expect(started.or_(failed).first).to_be_visible()
        if not failed.is_visible():
            break
        failed.locator("xpath=ancestor::*[.//button][1]").get_by_role("button").first.click()
        expect(failed).to_have_count(0)
    started.last.click()


def state(page: Page, name: str) -> Locator:
    """The badge of the run whose page this is."""
    return page.get_by_role("banner").get_by_text(name, exact=True)


def open_artifact(page: Page, key: str) -> None:
    """From the page of a run, or of another artifact that was opened there."""
    if "/artifacts/" in page.url:
        page.go_back()
    size = page.viewport_size
    page.set_viewport_size({"width": 1280, "height": 2200})  # what is below the fold is not there
    page.reload()  # nor is always what came while the page was open
    page.get_by_text("Artifacts", exact=True).last.click()
    page.goto(page.get_by_role("link", name=key).first.get_attribute("href") or "")
    if size:
        page.set_viewport_size(size)
    expect(page.get_by_role("link", name=key, exact=True).first).to_be_visible()
