"""Notebook and split: a text that the model continues, what may come next, and the way back."""

import pytest
from playwright.sync_api import expect
from support.browser import ChatPage
from support.page_scripts import SKY


@pytest.fixture
def writer(person: ChatPage) -> ChatPage:
    person.find("[data-view=notebook]").click()
    person.find("#notebook-text").fill("Of the sky: ")
    return person


def end_of_writing(writer: ChatPage) -> None:
    writer.until(
        "document.querySelector('#notebook-stop').hidden && !document.querySelector('#notebook-undo').disabled"
    )


def test_the_model_goes_on_with_the_text_and_it_can_be_undone_and_done_again(writer: ChatPage):
    text = writer.find("#notebook-text")
    writer.find("#notebook-generate").click()
    end_of_writing(writer)
    expect(text).to_have_value(f"Of the sky: {SKY}")
    expect(writer.find("#notebook .numbers")).to_contain_text("tokens/s", use_inner_text=True)
    writer.find("#notebook-undo").click()
    expect(text).to_have_value("Of the sky: ")
    text.focus()
    writer.page.keyboard.press("Control+Enter")
    end_of_writing(writer)
    writer.find("#notebook-regenerateText").click()
    end_of_writing(writer)
    expect(text).to_have_value(f"Of the sky: {SKY}")
    writer.page.reload()
    expect(text).to_have_value(f"Of the sky: {SKY}")


def test_writing_stops_when_it_is_told_to(writer: ChatPage):
    writer.find("#notebook-text").fill("An endless story: ")
    writer.find("#notebook-generate").click()
    writer.until("document.querySelector('#notebook-text').value.length > 60")
    writer.find("#notebook-stop").click()
    end_of_writing(writer)
    assert writer.find("#notebook-text").input_value().startswith("An endless story: and so on")


def test_split_writes_beside_the_prompt_and_goes_on_from_there(writer: ChatPage):
    writer.find("[data-view=split]").click()
    output = writer.find("#output-text")
    writer.find("#notebook-generate").click()
    end_of_writing(writer)
    expect(writer.find("#notebook-text")).to_have_value("Of the sky: ")
    expect(output).to_have_value(f"Of the sky: {SKY}")
    output.fill("Of the sky: The sky is")
    writer.find("#notebook-goOn").click()
    end_of_writing(writer)
    expect(output).to_have_value(f"Of the sky: {SKY}")
    assert writer.page.evaluate("document.documentElement.scrollWidth") <= 1200


def test_the_next_tokens_are_shown_and_a_click_takes_one(writer: ChatPage):
    writer.find("[data-look=next]").click()
    choice = writer.find("#next .choice", has_text="␣").first
    word = choice.locator(".token-text").inner_text()
    expect(writer.find("#next .choice")).to_have_count(20)
    choice.click()
    expected = "Of the sky: " + word.replace("␣", " ").replace("⏎", "\n")
    writer.until(f"document.querySelector('#notebook-text').value === {expected!r}")
    writer.find("#notebook-undo").click()
    expect(writer.find("#notebook-text")).to_have_value("Of the sky: ")


def test_the_text_is_shown_as_tokens_and_rendered(writer: ChatPage):
    writer.find("#notebook-text").fill("The sky is **blue**")
    writer.find("[data-look=tokens]").click()
    writer.find("#next .token").nth(2).wait_for()
    assert writer.find("#next .token").first.get_attribute("data-id") == "256"  # what begins a text
    shown = "".join(writer.find("#next .token").all_inner_texts()[1:])
    assert shown.replace("␣", " ") == "The sky is **blue**"
    writer.find("[data-look=rendered]").click()
    expect(writer.find("#next strong")).to_have_text("blue", use_inner_text=True)
