"""axe-core finds nothing serious, in light and dark, in any state of the page."""

import json
from collections.abc import Callable
from pathlib import Path

import axe_playwright_python
import pytest
from support.browser import ChatPage, answering

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
BAD = ("serious", "critical")


def violations(person: ChatPage) -> list[str]:
    person.page.evaluate(AXE + "; 0")
    results = person.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {json.dumps([node['html'][:120] for node in one['nodes']])}"
        for one in results["violations"]
        if one["impact"] in BAD
    ]


def answered(person: ChatPage) -> None:
    person.ask("What is the formula?")
    person.last_answer.locator(".hljs-keyword").first.wait_for()
    person.act(person.last_answer, "tokens")
    person.last_answer.locator(".token").nth(3).click()
    person.last_answer.locator(".panel input").check()


def editing(person: ChatPage) -> None:
    person.ask("Why is the sky blue?")
    person.act(person.find("article.user"), "edit")
    person.find("#conversations .more").click()


def settings(person: ChatPage) -> None:
    person.find("#open-settings").click()
    person.find("dialog details").first.wait_for()
    person.page.evaluate("document.querySelectorAll('dialog details').forEach((group) => (group.open = true))")


def characters(person: ChatPage) -> None:
    person.find("#open-characters").click()
    person.find("#new-character").click()


def model(person: ChatPage) -> None:
    told = {"model/list": {"model_names": ["one", "other"]}, "model/info": {"model_name": "one", "lora_names": []}}
    for path, answer in {**told, "lora/list": {"lora_names": ["poet"]}}.items():
        person.page.route(f"**/v1/internal/{path}", answering(answer))
    person.find("#open-model").click()
    person.find("#load-adapters").wait_for()
    person.page.unroute_all()


def notebook(person: ChatPage) -> None:
    person.find("[data-view=split]").click()
    person.find("#notebook-text").fill("Of the sky: ")
    person.find("[data-look=next]").click()
    person.find("#next .choice").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", [answered, editing, settings, characters, model, notebook])
def test_nothing_serious_is_found(person: ChatPage, state: Callable[[ChatPage], None], scheme: str):
    person.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    state(person)
    assert violations(person) == []
