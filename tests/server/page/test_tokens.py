"""What the page shows of the model: the tokens of an answer, what else was likely, and a way to take that."""

import json

from playwright.sync_api import expect
from support.browser import ChatPage
from support.page_scripts import CHINESE, OTHERWISE, SKY
from support.server import Running


def open_tokens(person: ChatPage) -> None:
    person.act(person.last_answer, "tokens")
    person.last_answer.locator(".token").first.wait_for()


def test_every_token_opens_to_ten_alternatives_and_itself(person: ChatPage):
    person.ask("Why is the sky blue?")
    open_tokens(person)
    tokens = person.last_answer.locator(".token")
    assert "".join(tokens.all_inner_texts()).replace("␣", " ") == SKY
    for place in (0, 3):
        tokens.nth(place).click()
        choices = person.last_answer.locator(".choice")
        expect(choices.nth(9)).to_be_visible()
        assert choices.count() in (10, 11)
        assert person.last_answer.locator(".choice[aria-current=true] .token-text").inner_text() == (
            tokens.nth(place).inner_text()
        )
    person.page.keyboard.press("ArrowRight")
    expect(person.last_answer.locator(".token[aria-current=true]")).to_have_text("␣because", use_inner_text=True)


def test_a_bar_that_is_clicked_takes_its_token_and_goes_on_from_there(person: ChatPage, scripted: Running):
    person.ask("Why is the sky blue?")
    open_tokens(person)
    person.last_answer.locator(".token").nth(3).click()
    ids = [int(token.get_attribute("data-id")) for token in person.last_answer.locator(".token").all()]
    choice = person.last_answer.locator(".choice:not([aria-current=true])", has_text="␣").first
    picked = int(choice.get_attribute("data-token"))
    word = choice.locator(".token-text").inner_text().replace("␣", " ").replace("⏎", "\n")
    with person.page.expect_request("**/v1/completions") as asked:
        choice.click()
    person.wait_for_end()
    prompt = json.loads(asked.value.post_data)["prompt"]
    assert prompt[-4:] == [*ids[:3], picked]
    status, read = scripted.post("/tokenize", {"messages": [{"role": "user", "content": "Why is the sky blue?"}]})
    assert (status, prompt[:-4]) == (200, read["tokens"])
    expect(person.last_answer.locator(".place")).to_have_text("2/2", use_inner_text=True)
    assert " ".join(person.texts()[1].split()) == " ".join(("The sky is" + word + OTHERWISE).split())
    open_tokens(person)  # those before the place are known, too
    expect(person.last_answer.locator(".token").nth(1)).to_have_text("␣sky", use_inner_text=True)


def test_half_a_character_can_be_taken(person: ChatPage):
    person.ask("What about 勾股?")
    open_tokens(person)
    person.last_answer.locator(".token").nth(1).click()
    half = person.last_answer.locator(".choice", has_text="<0x").first
    half.click()
    person.wait_for_end()
    assert person.texts()[1].startswith(CHINESE[:3])


def test_an_answer_of_which_nothing_was_kept_is_looked_at_by_the_model_once_more(person: ChatPage):
    person.page.evaluate("localStorage.setItem('llama.settings', JSON.stringify({keepTokens: false}))")
    person.page.reload()
    person.ask("Why is the sky blue?")
    open_tokens(person)
    assert "".join(person.last_answer.locator(".token").all_inner_texts()).replace("␣", " ").strip() == SKY
    person.last_answer.locator(".token").nth(2).click()
    choices = person.last_answer.locator(".choice")
    expect(choices.nth(9)).to_be_visible()
    assert choices.count() in (10, 11)


def test_ids_and_the_raw_prompt_are_shown(person: ChatPage):
    person.ask("Why is the sky blue?")
    open_tokens(person)
    person.last_answer.locator(".panel input").check()
    shown = person.page.evaluate("getComputedStyle(document.querySelector('.with-ids .token'), '::after').content")
    assert shown.strip('"') == person.last_answer.locator(".token").first.get_attribute("data-id")
    person.act(person.last_answer, "raw")
    expect(person.last_answer.locator(".panel pre").first).to_have_text(
        "<s>[INST] Why is the sky blue? [/INST]", use_inner_text=True
    )
