"""Who answers: an adapter for one conversation, another model for all; and what is done when a conversation is long."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect
from support.adapter_files import save_adapter
from support.browser import ChatPage, forget
from support.meta_files import save_meta, save_tokenizer
from support.page_scripts import SKY
from support.server import serving
from support.tiny import tiny_args, tiny_weights

from llama import Llama


@pytest.fixture
def with_adapters(person: ChatPage) -> ChatPage:
    """A server that says of two adapters that they are there."""

    def tell(route: Route) -> None:
        told = route.fetch().json()
        [model] = told["data"]
        told["data"] += [model | {"id": name, "parent": model["id"]} for name in ("poet", "clerk")]
        route.fulfill(json=told)

    person.page.route("**/v1/models", tell)
    person.page.reload()
    person.page.wait_for_selector("#model-name:not(:empty)")
    yield person
    person.page.unroute_all()


def open_dialog(person: ChatPage, choose: str | None = None) -> None:
    with person.page.expect_response("**/v1/internal/model/list"):
        person.find("#open-model").click()
    person.find("#answerers").wait_for()
    if choose:
        person.find("#answerers label", has_text=choose).click()


def test_an_adapter_answers_the_conversation_that_chose_it(with_adapters: ChatPage):
    person = with_adapters
    person.ask("Why is the sky blue?")
    open_dialog(person, choose="poet")
    person.page.keyboard.press("Escape")
    person.until("document.querySelector('#model-name').textContent === 'poet'")
    with person.page.expect_request("**/v1/chat/completions") as asked:
        person.ask("And why is the sky blue?")
    assert json.loads(asked.value.post_data)["model"] == "poet"
    person.page.keyboard.press("Control+Shift+O")  # the next begins with it, and may have another
    open_dialog(person, choose="the model itself")
    person.until("document.querySelector('#model-name').textContent === 'model'")
    person.page.keyboard.press("Escape")
    with person.page.expect_request("**/v1/chat/completions") as asked:
        person.ask("What is the formula?")
    assert json.loads(asked.value.post_data)["model"] == "model"
    person.find("#conversations .open", has_text="sky").click()
    person.until("document.querySelector('#model-name').textContent === 'poet'")


def test_an_adapter_that_is_gone_leaves_the_model_to_answer(with_adapters: ChatPage):
    person = with_adapters
    open_dialog(person, choose="poet")
    person.until("document.querySelector('#model-name').textContent === 'poet'")
    person.page.keyboard.press("Escape")
    person.page.unroute_all()
    person.until("document.querySelector('#model-name').textContent === 'model'")
    with person.page.expect_request("**/v1/chat/completions") as asked:
        person.ask("Why is the sky blue?")
    assert json.loads(asked.value.post_data)["model"] == "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models, and an adapter for them."""
    args = tiny_args(vocab_size=400, multiple_of=64)
    for seed, name in enumerate(("one", "two")):
        save_meta(tmp_path / "models" / name, args, tiny_weights(args, seed))
        save_tokenizer(tmp_path / "models" / name / "tokenizer.model")
    save_adapter(tmp_path / "adapters" / "poet", 1)
    return tmp_path


def test_models_and_adapters_come_and_go_with_the_admin_key(window: Page, folder: Path):
    def build(path: str | None = None, options: Any = None) -> Llama:
        common = {"max_seq_len": 256, "device": "cpu", "dtype": "fp32"}
        return Llama.build(path or folder / "models" / "one", **common | (options or {}))

    settings = {"model_dir": folder / "models", "lora_dir": folder / "adapters", "admin_key": "boss"}
    with serving(build, **settings) as running:
        forget(window, running.url)
        person = ChatPage(window, running.url).open()
        name = person.find("#model-name")
        open_dialog(person)
        person.find("#setting-otherModel").select_option("two")
        person.find("#load-model").click()
        person.find("dialog .note", has_text="this takes the admin key").wait_for()
        person.find("#setting-adminKey").fill("boss")
        person.find("#setting-adminKey").blur()
        person.find("#load-model").click()
        person.find("#toasts p", has_text="two is loaded").wait_for()
        expect(name).to_have_text("two", use_inner_text=True)
        person.find("#adapter-poet").check()
        person.find("#load-adapters").click()
        person.find("#answerers label", has_text="poet").click()
        person.until("document.querySelector('#model-name').textContent === 'poet'")
        held: list[Route] = []
        window.route("**/v1/internal/lora/list", lambda route: held.append(route))
        person.find("#unload-model").click()
        person.find("#state", has_text="No model is loaded").wait_for()
        while not held:
            window.wait_for_timeout(20)  # until the dialog asks what there is now
        assert person.find("#setting-otherModel").is_disabled(), "what is chosen in a list that is about to go is lost"
        held[0].continue_()
        window.unroute("**/v1/internal/lora/list")
        person.find("#setting-otherModel").select_option("one")
        person.find("#load-model").click()
        person.until("document.querySelector('#model-name').textContent === 'one'")
        person.until("document.querySelector('#state').hidden")
        assert "boss" not in window.evaluate("JSON.stringify(localStorage)")
        person.close()


def test_a_server_with_one_model_offers_no_other(person: ChatPage):
    open_dialog(person)
    # the rows are made anew when the answer is there: what was found at once may be gone before its text is read
    only = re.compile(r"^model\nthe model itself, 8192 tokens of context$")
    expect(person.find("dialog label")).to_have_text([only], use_inner_text=True)


def test_the_oldest_turns_are_left_out_where_a_conversation_is_longer_than_the_context(person: ChatPage):
    texts = ["1" * 4000, "one", "2" * 4000, "two", "3" * 2000, "three"]
    messages = [
        {"id": str(i), "parent": str(i - 1) if i else None, "role": ["user", "assistant"][i % 2], "created": i}
        | {"content": text, "finish": "stop"}
        for i, text in enumerate(texts)
    ]
    info = {"title": "Long", "created": 0, "updated": 0, "pinned": False, "leaf": "5", "messages": messages}
    exported = json.dumps({"format": "llama-conversations", "version": 1, "conversations": [info]}).encode()
    file = {"name": "long.json", "mimeType": "application/json", "buffer": exported}
    person.page.set_input_files("#import-file", [file])
    person.find("#conversations .open", has_text="Long").click()
    person.until("document.querySelectorAll('article').length === 6")
    with person.page.expect_request("**/v1/chat/completions") as asked:
        answer = person.ask("Why is the sky blue?")
    read = [message["content"] for message in json.loads(asked.value.post_data)["messages"]]
    assert read == [*texts[2:], "Why is the sky blue?"]
    expect(answer.locator(".prose")).to_have_text(SKY, use_inner_text=True)
    expect(answer.locator(".numbers")).to_contain_text("the first 2 messages did not fit", use_inner_text=True)
    person.act(answer, "raw")
    assert person.last_answer.locator(".panel pre").first.inner_text().startswith(f"<s>[INST] {texts[2]}")
