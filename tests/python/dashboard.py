"""Uses the dashboard in a browser as an operator would, and looks at what it shows.

Given as JSON on standard input: `open`, the admin side, pid and rules of a relay with the sinks crm (takes everything), ops
(refuses each event once) and audit (is down); `locked`, a relay with a token; how to post webhooks; where screenshots go.
"""

import json
import os
import shutil
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "chromium-headless-shell"]
MARKUP = "<img src=x onerror=alert(1)>"


class Relay:
    def __init__(self, given, page: Page):
        self.admin = given["admin"]
        self.given, self.page, self.number = given, page, 0

    def post(self, status, message="wamid"):
        self.number += 1
        event = {
            "message_id": f"{message}.{self.number}",
            "message_status": status,
            "channel": {"sender_id": "5491122223333"},
            "event_name": "msg_status",
            "event_timestamp": "1687548944",
            "long": 12345678901234567890,
        }
        name, value = self.given["header"]
        headers = {name: value, "content-type": "application/json"}
        request = urllib.request.Request(self.given["ingress"], json.dumps(event).encode(), headers)
        assert urllib.request.urlopen(request).status == 200

    def api(self, path):
        return json.load(urllib.request.urlopen(f"{self.admin}/api/v1/{path}"))

    def sink(self, name):
        return self.page.get_by_role("article", name=f"Sink {name}")

    def letters(self):
        return self.page.locator("#letter-list > li")

    def button(self, name, **options):
        return self.page.get_by_role("button", name=name, **options)


def figures_are_live(relay: Relay):
    page = relay.page
    expect(page.locator("#ready")).to_have_text("accepting")
    for name in ["crm", "ops", "audit"]:
        expect(relay.sink(name)).to_contain_text("ok")
    expect(page.get_by_text("No dead letters.")).to_be_visible()
    expect(page.get_by_text("No attempt has failed since the start.")).to_be_visible()
    for _ in range(20):
        relay.post("read")
    expect(relay.sink("crm")).to_contain_text("20 delivered")
    expect(page.locator("#route-list > li").filter(has_text="everything")).to_contain_text("20")
    relay.post("nonsense")
    expect(page.locator("#route-rest")).to_contain_text("no route matched: 1")
    relay.post("error", MARKUP)
    expect(relay.sink("audit")).to_contain_text("failing")
    expect(relay.sink("ops")).to_contain_text("ok")
    for kind in ["http_400", "http_503"]:
        expect(page.locator("#failure-list > li").filter(has_text=kind).first).to_be_visible()
    expect(relay.letters()).to_have_count(2)


def dead_letters_are_worked_through(relay: Relay):
    page, rejected = relay.page, relay.letters().filter(has_text="rejected")
    rejected.get_by_role("button", name="Inspect").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("http_400")
    expect(dialog.locator("#letter-body")).to_contain_text(f'"message_id": "{MARKUP}.22"')
    expect(dialog.locator("#letter-body")).to_contain_text("12345678901234567890")
    pictures(relay, "letter")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(rejected.get_by_role("button", name="Inspect")).to_be_focused()
    rejected.get_by_role("button", name="Replay").click()
    expect(relay.sink("ops")).to_contain_text("1 delivered")
    expect(rejected).to_have_count(0)

    relay.post("error")
    expect(rejected).to_have_count(1)
    page.get_by_label("Reason").select_option("expired")
    expect(page.get_by_text("No dead letter matches.")).to_be_visible()
    relay.button("Clear").click()
    rejected.get_by_role("button", name="Discard").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(rejected).to_have_count(1)
    rejected.get_by_role("button", name="Discard").click()
    page.get_by_role("dialog").get_by_role("button", name="Discard").click()
    expect(rejected).to_have_count(0)

    for _ in range(3):
        relay.post("error")
    expect(rejected).to_have_count(3)
    page.get_by_label("Event status").fill("error")
    expect(page.locator("#letter-count")).to_have_text("3 in all")
    relay.button("Replay all that match").click()
    expect(page.get_by_role("dialog")).to_contain_text("Replay 3 dead letters with status error?")
    relay.button("Replay all", exact=True).click()
    expect(relay.sink("ops")).to_contain_text("4 delivered")
    relay.button("Clear").click()
    expect(relay.letters()).to_have_count(1)


def a_sink_is_paused_by_keyboard(relay: Relay):
    page = relay.page
    page.locator("h1").click()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.ariaLabel") == "Pause crm":
            break
    expect(relay.button("Pause crm")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus shows"
    page.keyboard.press("Enter")
    expect(relay.sink("crm")).to_contain_text("paused")
    expect(relay.button("Resume crm")).to_be_focused()
    delivered = relay.api("sinks/crm")["delivered"]
    relay.post("read")
    expect(relay.sink("crm")).to_contain_text("1 events,")
    page.keyboard.press("Enter")
    expect(relay.sink("crm")).to_contain_text(f"{delivered + 1} delivered")


def events_are_explained(relay: Relay):
    page, explained = relay.page, relay.page.locator("#explained")
    event = page.get_by_label("An event as Engage posts it")
    event.fill('{"message_id": "m", "message_status": "error"}')
    relay.button("Explain").click()
    route = explained.get_by_role("listitem").filter(has_text="errors")
    expect(route.first).to_contain_text("matches")
    expect(explained).to_contain_text("webhook-id")
    expect(explained).to_contain_text("/rejects")
    pictures(relay, "explained")
    event.fill('{"message_status": "read"}')
    relay.button("Explain").click()
    expect(route.first).to_contain_text("found “read”")
    event.fill("{")
    relay.button("Explain").click()
    expect(explained).to_contain_text("JSON")


def broken_rules_are_shown(relay: Relay):
    page, rules = relay.page, Path(relay.given["rules"])
    good = rules.read_text()
    rules.write_text(good + '[[routes]]\nto = ["nowhere"]\nwhem = {}\n')
    refused = page.get_by_text("The files on disk can't be used")
    expect(refused).to_be_visible()
    expect(page.locator("#problems > li")).to_have_count(2)
    expect(page.locator("#problems")).to_contain_text("routes.toml:")
    relay.button("Reload").click()
    expect(page.locator("#notice")).to_contain_text("whem")
    pictures(relay, "broken")
    rules.write_text(good)
    relay.button("Reload").click()
    expect(refused).to_be_hidden()
    expect(page.locator("#rules-state .good")).to_be_visible()


def pictures(relay: Relay, name):
    page = relay.page
    for scheme in ["light", "dark"]:
        for width in [1280, 360]:
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 800})
            sizes = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert sizes[0] <= sizes[1] == width, f"{name} scrolls sideways at {width}: {sizes}"
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark"), background
            page.evaluate("scrollTo({ top: 0, behavior: 'instant' })")
            full = page.locator("dialog[open]").count() == 0
            page.screenshot(path=f"{relay.given['screenshots']}/{name}-{scheme}-{width}.png", full_page=full)
    page.set_viewport_size({"width": 1280, "height": 800})


def other_sites_can_not_operate_it(relay: Relay):
    """By a request to the relay's address, and from a page whose name has been given that address."""
    page = relay.page
    page.goto(relay.given["ingress"])
    attack = f"fetch('{relay.admin}/api/v1/sinks/crm/pause', {{ method: 'POST', mode: 'no-cors' }})"
    page.evaluate(attack)
    assert not relay.api("sinks/crm")["paused"]
    page.goto(relay.admin.replace("127.0.0.1", "rebound.example"))
    expect(page.locator("#unreachable")).to_contain_text("without admin.token")


def a_token_is_asked_for(relay: Relay):
    page = relay.page
    page.goto(relay.admin)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This relay wants a token")
    pictures(relay, "token")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    relay.button("Enter it").click()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("That is not the token.")
    page.keyboard.type(relay.given["token"])
    page.keyboard.press("Enter")
    expect(page.locator("#ready")).to_have_text("accepting")
    expect(dialog).to_be_hidden()
    page.reload()
    expect(page.locator("#ready")).to_have_text("accepting")
    os.kill(relay.given["pid"], signal.SIGTERM)
    expect(page.locator("#unreachable")).to_contain_text("No news from the relay")
    pictures(relay, "gone")


def main(given):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert browser, f"none of {BROWSERS} is installed"
    expect.set_options(timeout=20_000)
    arguments = ["--host-resolver-rules=MAP rebound.example 127.0.0.1"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=arguments)
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(20_000)
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
        relay = Relay(given["open"], page)
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(relay.admin)
        figures_are_live(relay)
        pictures(relay, "working")
        dead_letters_are_worked_through(relay)
        a_sink_is_paused_by_keyboard(relay)
        events_are_explained(relay)
        broken_rules_are_shown(relay)
        assert page.locator("img").count() == 0, "what a sender wrote is text"
        elsewhere = [url for url in requests if not url.startswith((relay.admin, "data:image/svg+xml"))]
        assert not elsewhere, elsewhere
        other_sites_can_not_operate_it(relay)
        a_token_is_asked_for(Relay(given["locked"], page))
        assert not wrong, wrong
        chromium.close()


main(json.load(sys.stdin))
