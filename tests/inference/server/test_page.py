"""The page in a browser: text streams, map and bytes are the server's, and nothing a model says becomes markup."""

import json
import os
import shutil
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.inference.server.servers import model_of, serve, tokenizer_with

pytestmark = pytest.mark.roads
BROWSER = os.environ.get("KVTRAIN_BROWSER") or shutil.which("chromium") or shutil.which("chromium-browser")
MARKUP = "<img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
    if BROWSER is None:
        pytest.skip("no browser: apt-get install chromium, or name one in KVTRAIN_BROWSER")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def errors():
    return []


@pytest.fixture
def open_page(browser, errors):
    """Opens a server's page, and collects what the browser complains of."""
    pages = []

    def open_page(url, width=1280, height=900):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        wait(page, "document.title !== 'kvtrain'")  # the script has begun
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert errors == []


def wait(page, expression):
    """Until a condition holds; ``wait_for_function`` would evaluate it as the page itself, which its policy forbids."""
    end = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def held_bytes(url):
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return next(family.samples[0].value for family in families if family.name == "kvtrain_kv_held_bytes")


def ask(page, text, tokens):
    page.fill("#tokens", str(tokens))
    page.fill("#temperature", "0")
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def test_a_text_goes_on_while_the_cache_is_shown(open_page, tmp_path):
    model = model_of("dmc")
    model.register_forward_pre_hook(lambda *_: time.sleep(0.01))  # the text outlasts a browser on a busy machine
    with serve(model, tokenizer_with(None), keys=()) as served:
        page = open_page(served.url)
        assert page.text_content("#talk-title") == "Continue a text" and "small" in page.title()
        ask(page, "import os", 2000)
        wait(page, "document.querySelectorAll('#map td.share').length > 0")
        assert page.locator("#map td.share").count() == 2 * 2 and not page.is_disabled("#stop")
        assert all(0 <= int(cell) <= 100 for cell in page.locator("#map td.share").all_text_contents())
        wait(page, "document.querySelector('#chart .held').points.length > 1")
        some = page.text_content(".said.assistant .text")
        wait(page, f"document.querySelector('.assistant .text').textContent.length > {len(some)}")
        assert float(page.text_content("#speed")) > 0
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        page.keyboard.press("Escape")
        wait(page, "document.querySelector('.assistant .facts').textContent === 'stopped'")
        wait(page, "document.querySelector('#running').textContent === '0'")
        ask(page, "import os", 40)
        wait(page, "document.querySelectorAll('.facts')[3].textContent.includes('tokens')")
        wait(page, f"document.querySelector('#all').dataset.bytes === '{held_bytes(served.url):.0f}'")
        assert held_bytes(served.url) > 0


def test_a_chat_keeps_its_turns_and_markup_stays_text(open_page):
    tokenizer = tokenizer_with("{% for m in messages %}<|endoftext|>{{ m.content }}{% endfor %}<|endoftext|>")
    with serve(model_of("dmc"), tokenizer, keys=()) as served:
        page = open_page(served.url)
        said = {"text": MARKUP, "usage": None}
        page.route("**/v1/chat/completions", lambda route: route.fulfill(**stream_of(said["text"])))
        ask(page, MARKUP, 5)
        wait(page, "document.querySelector('.assistant .facts').textContent.includes('5 tokens')")
        assert page.text_content(".assistant .text") == page.text_content(".user .text") == MARKUP
        assert page.locator("#log img").count() == 0 and page.title() == "small · kvtrain"
        page.unroute("**/v1/chat/completions")
        with page.expect_request("**/v1/chat/completions") as caught:
            ask(page, "and now?", 5)
        assert [message["role"] for message in caught.value.post_data_json["messages"]] == ["user", "assistant", "user"]
        wait(page, "document.querySelectorAll('.facts')[3].textContent.includes('a head keeps')")
        assert "failed" not in page.inner_html("#log")


def stream_of(text):
    """A stream whose model says this."""
    facts = {"seen_tokens": 8, "kept_tokens": 4.0, "held_bytes": 10, "plain_bytes": 20}
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
        "kvtrain": facts,
    }
    parts = [{"choices": [{"index": 0, "delta": {"content": text}}]}, {"choices": [], "usage": usage}]
    body = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"
    return {"status": 200, "headers": {"content-type": "text/event-stream"}, "body": body}


def test_a_refusal_is_shown_and_the_page_fits_a_phone(open_page, errors, tmp_path):
    with serve(model_of("dmc"), tokenizer_with(None), keys=()) as served:
        page = open_page(served.url, 360, 740)
        ask(page, "x", 99999)
        wait(page, "document.querySelector('.failed .facts')?.textContent.includes('above the 3,000')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert errors.pop().startswith("Failed to load resource") and not errors  # the browser's own note of a 413
        order = []
        page.focus("#log")
        for _ in range(6):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id"))
        assert order == ["prompt", "tokens", "temperature", "send", "map-frame", ""]
        page.screenshot(path=tmp_path / "phone.png", full_page=True)
