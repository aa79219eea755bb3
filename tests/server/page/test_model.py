"""Who answers: an adapter for one conversation, another model for all; and what is done when a conversation is long."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Route
from support.browser import ChatPage, answering
from support.page_scripts import SKY


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


def no_complaint_but_of_what_is_refused(person: ChatPage) -> None:
    person.complaints[:] = [text for text in person.complaints if "Failed to load resource" not in text]


def test_an_adapter_answers_the_conversation_that_chose_it(with_adapters: ChatPage):
    person = with_adapters
    person.ask("Why is the sky blue?")
    open_dialog(person, choose="poet")
    person.page.keyboard.press("Escape")
    assert person.find("#model-name").inner_text() == "poet"
    with person.page.expect_request("**/v1/chat/completions") as asked:
        person.ask("And why is the sky blue?")
    assert json.loads(asked.value.post_data)["model"] == "poet"
    person.page.keyboard.press("Control+Shift+O")  # the next begins with it, and may have another
    open_dialog(person, choose="the model itself")
    person.page.keyboard.press("Escape")
    with person.page.expect_request("**/v1/chat/completions") as asked:
        person.ask("What is the formula?")
    assert json.loads(asked.value.post_data)["model"] == "model"
    person.find("#conversations .open", has_text="sky").click()
    person.until("document.querySelector('#model-name').textContent === 'poet'")
    no_complaint_but_of_what_is_refused(person)


def test_an_adapter_that_is_gone_leaves_the_model_to_answer(with_adapters: ChatPage):
    person = with_adapters
    open_dialog(person, choose="poet")
    person.page.keyboard.press("Escape")
    person.page.unroute_all()
    person.until("document.querySelector('#model-name').textContent === 'model'")
    with person.page.expect_request("**/v1/chat/completions") as asked:
        person.ask("Why is the sky blue?")
    assert json.loads(asked.value.post_data)["model"] == "model"
    no_complaint_but_of_what_is_refused(person)


def test_a_model_and_adapters_are_loaded_with_the_admin_key(person: ChatPage):
    keys, changes = [], []

    def admin(told: Any) -> Callable[[Route], None]:
        def answer(route: Route) -> None:
            key = route.request.headers.get("authorization")
            keys.append(key)
            if key != "Bearer admin":
                refusal = {"message": "this takes the admin key", "code": "admin_key_needed"}
                return route.fulfill(status=403, json={"error": refusal})
            if route.request.method == "POST":
                changes.append((route.request.url.rpartition("internal/")[2], route.request.post_data_json))
            route.fulfill(json=told)

        return answer

    told = {
        "model/list": {"model_names": ["model", "other"]},
        "model/info": {"model_name": "model", "lora_names": ["clerk"]},
        "model/load": "OK",
        "lora/list": {"lora_names": ["poet", "clerk"]},
        "lora/load": "OK",
    }
    for path, answer in told.items():
        person.page.route(f"**/v1/internal/{path}", admin(answer))
    open_dialog(person)
    person.find("#setting-adminKey").fill("admin")
    person.find("#setting-adminKey").blur()
    person.find("#setting-otherModel").select_option("other")
    person.find("#load-model").click()
    person.find("#toasts p", has_text="other is loaded").wait_for()
    assert person.find("#adapter-clerk").is_checked()
    person.find("#adapter-poet").check()
    person.find("#load-adapters").click()
    person.find("#toasts p", has_text="poet, clerk is loaded").wait_for()
    assert changes == [
        ("model/load", {"model_name": "other", "args": {}, "settings": {}}),
        ("lora/load", {"lora_names": ["poet", "clerk"]}),
    ]
    assert set(keys) == {None, "Bearer admin"}
    assert "admin" not in person.page.evaluate("localStorage.getItem('llama.settings') ?? ''")
    person.page.unroute_all()
    no_complaint_but_of_what_is_refused(person)


def test_what_the_server_does_not_offer_is_not_shown(person: ChatPage):
    person.page.route("**/v1/internal/**", answering({"error": {"message": "off", "code": "admin_off"}}, status=403))
    open_dialog(person)
    assert person.find("dialog label").all_inner_texts() == ["model\nthe model itself, 8192 tokens of context"]
    person.page.unroute_all()
    no_complaint_but_of_what_is_refused(person)


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
    assert answer.locator(".prose").inner_text() == SKY
    assert "the first 2 messages did not fit" in answer.locator(".numbers").inner_text()
    person.act(answer, "raw")
    assert person.last_answer.locator(".panel pre").first.inner_text().startswith(f"<s>[INST] {texts[2]}")
