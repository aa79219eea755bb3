"""The chat in a real browser: what is typed is answered, and kept; answers stop, go on, and have versions."""

import json
import re

import pytest
from playwright.sync_api import expect
from support.browser import ChatPage
from support.page_scripts import CHINESE, FORMULA, SKY
from support.server import Running


def metric(scripted: Running, name: str) -> float:
    _, text = scripted.get("/metrics")
    return float(re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)[1])


def is_at_end(person: ChatPage) -> bool:
    return person.page.evaluate(
        "(s => s.scrollHeight - s.scrollTop - s.clientHeight < 2)(document.querySelector('#scroll'))"
    )


def test_a_typed_question_gets_an_answer_with_formulas_a_table_and_code(person: ChatPage):
    answer = person.ask("What is the formula?")
    answer.locator(".katex").nth(3).wait_for()
    expect(answer.locator(".katex-display")).to_have_count(2)
    expect(answer.locator("td")).to_have_text(["formula", "3"])
    assert answer.locator("th").last.get_attribute("align") == "right"
    answer.locator(".hljs-keyword").first.wait_for()
    expect(answer.locator(".code-head")).to_have_text("python", use_inner_text=True)
    answer.locator(".code-head button").click()
    code = json.dumps(FORMULA.split("```")[1].removeprefix("python\n")[:-1])
    person.until(f"navigator.clipboard.readText().then((copied) => copied === {code})")
    expect(answer).to_contain_text("It costs $5 and $10.", use_inner_text=True)


def test_an_answer_tells_its_numbers_and_its_model(person: ChatPage):
    answer = person.ask("Why is the sky blue?")
    numbers = answer.locator(".numbers").inner_text()
    assert "tokens/s" in numbers
    assert "of 8192 tokens" in numbers
    expect(answer.locator(".who")).to_have_text("model", use_inner_text=True)


def test_a_conversation_survives_a_reload(person: ChatPage):
    person.ask("Why is the sky blue?")
    person.ask("And in Chinese: 勾股?")
    before = person.texts()
    assert before[1::2] == [SKY, CHINESE.replace("**", "")]
    person.page.reload()
    person.wait_for_rest()
    person.wait_for_texts(before)


def test_stop_frees_what_the_engine_held_and_continue_goes_on(person: ChatPage, scripted: Running):
    person.write("Tell me the endless story")
    person.until("document.querySelector('.prose')?.textContent.length > 30")
    assert metric(scripted, "vllm:kv_cache_usage_perc") > 0
    num_aborted = metric(scripted, "llama_aborted_total")
    person.page.keyboard.press("Escape")
    person.wait_for_end()
    scripted.wait_until_idle()
    assert metric(scripted, "vllm:kv_cache_usage_perc") == 0
    assert metric(scripted, "llama_aborted_total") == num_aborted + 1  # it did not just come to its end
    stopped = person.last_answer.locator(".prose").inner_text()
    expect(person.last_answer.locator(".note")).to_have_text("Stopped.", use_inner_text=True)
    assert is_at_end(person)
    person.act(person.last_answer, "continue")
    person.until(f"document.querySelector('.prose').textContent.length > {len(stopped) + 30}")
    person.find("#stop-answer").click()
    person.wait_for_end()
    text = person.last_answer.locator(".prose").inner_text()
    assert text.startswith(stopped)
    assert ("and so on " * 700).startswith(text)


def test_an_answer_that_a_reload_cut_off_is_there_and_can_be_continued(person: ChatPage):
    person.write("Tell me the endless story")
    person.until("document.querySelector('.prose')?.textContent.length > 300")
    person.page.wait_for_timeout(1100)  # it is saved every second
    person.page.reload()
    person.wait_for_end()
    cut = person.last_answer.locator(".prose").inner_text()
    assert len(cut) > 100
    expect(person.last_answer.locator(".note")).to_have_text("This answer was cut off.", use_inner_text=True)
    person.act(person.last_answer, "continue")
    person.until(f"document.querySelector('.prose').textContent.length > {len(cut) + 30}")
    person.find("#stop-answer").click()
    person.wait_for_end()
    assert ("and so on " * 700).startswith(person.last_answer.locator(".prose").inner_text())


def test_answers_have_versions(person: ChatPage):
    person.ask("Why is the sky blue?")
    person.act(person.last_answer, "regenerate")
    person.wait_for_end()
    expect(person.last_answer.locator(".place")).to_have_text("2/2", use_inner_text=True)
    person.act(person.last_answer, "earlier")
    person.last_answer.locator(".place", has_text="1/2").wait_for()


def test_an_edited_question_is_a_branch_and_the_other_stays(person: ChatPage):
    person.ask("Why is the sky blue?")
    question = person.find("article.user")
    person.act(question, "edit")
    question.locator("textarea").fill("What about 勾股?")
    question.locator("[data-act=saveSend]").click()
    person.wait_for_end()
    person.wait_for_texts(["What about 勾股?", CHINESE.replace("**", "")])
    person.act(person.find("article.user"), "earlier")
    person.wait_for_texts(["Why is the sky blue?", SKY])


def test_an_edited_answer_is_saved_or_continued(person: ChatPage):
    answer = person.ask("Why is the sky blue?")
    person.act(answer, "edit")
    answer.locator("textarea").fill("The sky is")
    answer.locator("[data-act=saveOn]").click()
    person.wait_for_end()
    expect(person.last_answer.locator(".prose")).to_have_text(SKY, use_inner_text=True)
    person.act(person.last_answer, "edit")
    person.last_answer.locator("textarea").fill("It is not.")
    person.last_answer.locator("[data-act=save]").click()
    person.wait_for_texts(["Why is the sky blue?", "It is not."])


def test_a_message_branches_into_a_conversation_of_its_own(person: ChatPage):
    person.ask("Why is the sky blue?")
    person.act(person.last_answer, "branch")
    person.find("#conversations > li").nth(1).wait_for()
    person.wait_for_texts(["Why is the sky blue?", SKY])


def test_a_text_file_is_attached_and_read_by_the_model(person: ChatPage):
    person.page.set_input_files(
        "#attach-file",
        [
            {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"the ```formula```"},
            {"name": "picture.png", "mimeType": "image/png", "buffer": b"\x89PNG\0\0"},
        ],
    )
    person.page.wait_for_selector("#files li")
    assert person.find("#files li").all_inner_texts() == ["notes.txt"]
    expect(person.find("#toasts")).to_contain_text("picture.png is no text file", use_inner_text=True)
    answer = person.ask("What does it say?")
    expect(answer).to_contain_text("quadratic", use_inner_text=True)  # the word that asks for it stands in the file
    expect(person.find("article.user summary")).to_have_text("notes.txt", use_inner_text=True)


def test_conversations_are_found_named_pinned_and_deleted(person: ChatPage):
    person.ask("Why is the sky blue?")
    person.page.keyboard.press("Control+Shift+O")
    person.ask("What is the formula?")
    rows = person.find("#conversations .open")
    expect(rows).to_have_text(["What is the formula?", "Why is the sky blue?"])
    person.page.keyboard.press("Control+K")
    person.page.keyboard.type("scatters")
    person.until("document.querySelectorAll('#conversations .open').length === 1")
    person.find("#conversations .more").click()
    person.find(".menu button").nth(1).click()  # pin
    person.page.fill("#search", "")
    person.until("document.querySelectorAll('#conversations .open').length === 2")
    expect(rows.first).to_have_text("Why is the sky blue?", use_inner_text=True)
    person.find("#conversations .more").first.click()
    person.find(".menu button").first.click()
    person.page.fill("dialog input", "Colours")
    person.page.keyboard.press("Enter")
    person.until("document.querySelector('#conversations .open').textContent === 'Colours'")
    person.find("#conversations .more").first.click()
    person.find(".menu button").last.click()
    person.find("dialog button.main").click()
    person.until("document.querySelectorAll('#conversations .open').length === 1")


def test_conversations_go_out_and_come_in_again(person: ChatPage, tmp_path):
    person.ask("Why is the sky blue?")
    person.act(person.last_answer, "regenerate")
    person.wait_for_end()
    with person.page.expect_download() as taken:
        person.find("#export").click()
    taken.value.save_as(tmp_path / "out.json")
    person.page.set_input_files("#import-file", tmp_path / "out.json")
    person.find("#conversations > li").nth(1).wait_for()
    person.find("#conversations .open:not([aria-current])").click()
    person.until("document.querySelectorAll('article').length === 2")
    person.wait_for_texts(["Why is the sky blue?", SKY])
    expect(person.last_answer.locator(".place")).to_have_text("2/2", use_inner_text=True)
    (tmp_path / "other.json").write_text('{"format": "another"}')
    person.page.set_input_files("#import-file", tmp_path / "other.json")
    person.page.wait_for_selector("text=this is no export")


def test_the_system_prompt_reaches_the_model(person: ChatPage):
    person.find("#system summary").click()
    person.page.fill("#system-text", "Speak of the formula")
    expect(person.ask("Hello")).to_contain_text("quadratic", use_inner_text=True)


def test_keys_alone_lead_from_the_start_to_an_answer_and_to_its_buttons(person: ChatPage):
    assert person.page.evaluate("document.activeElement.id") == "composer-text"
    person.page.keyboard.type("Why is the")
    person.page.keyboard.press("Shift+Enter")
    person.page.keyboard.type("sky blue?")
    person.page.keyboard.press("Enter")
    person.wait_for_end()
    person.wait_for_texts(["Why is the\nsky blue?", SKY])
    assert person.page.evaluate("document.activeElement.id") == "composer-text"
    for _ in range(30):
        person.page.keyboard.press("Shift+Tab")
        if person.page.evaluate("document.activeElement.dataset.act") == "regenerate":
            break
    person.page.keyboard.press("Enter")
    person.wait_for_end()
    expect(person.last_answer.locator(".place")).to_have_text("2/2", use_inner_text=True)


def test_enter_that_ends_a_word_of_an_input_method_does_not_send(person: ChatPage):
    person.page.fill("#composer-text", "gou")
    person.page.evaluate(
        """document.querySelector("#composer-text").dispatchEvent(
            new KeyboardEvent("keydown", {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))"""
    )
    assert person.find("article").count() == 0
    expect(person.find("#composer-text")).to_have_value("gou")


def test_who_scrolls_up_is_left_there(person: ChatPage):
    person.page.set_viewport_size({"width": 500, "height": 360})
    person.write("Tell me the endless story")
    person.until("document.querySelector('#scroll').scrollTop > 50")
    person.page.evaluate("document.querySelector('#scroll').scrollTop = 0")
    person.find("#to-end").wait_for()
    written = len(person.last_answer.locator(".prose").inner_text())
    person.until(f"document.querySelector('.prose').textContent.length > {written + 200}")
    assert person.page.evaluate("document.querySelector('#scroll').scrollTop") == 0
    person.find("#to-end").click()
    person.until("(s => s.scrollHeight - s.scrollTop - s.clientHeight < 60)(document.querySelector('#scroll'))")
    person.page.keyboard.press("Escape")
    person.wait_for_end()


def test_an_answer_that_begins_and_ends_touches_no_other(person: ChatPage):
    """In a long conversation that would take as long as many frames."""
    person.ask("Why is the sky blue?")
    person.page.evaluate(
        """() => {
            window.num_changes = 0;
            const count = (records) => (window.num_changes += records.length);
            for (const message of document.querySelectorAll("article"))
                new MutationObserver(count).observe(message, { subtree: true, childList: true, characterData: true });
        }"""
    )
    person.write("Why is the sky blue, again?")
    person.until("document.querySelectorAll('article').length === 4")
    person.wait_for_end()
    assert person.page.evaluate("window.num_changes") == 0


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_narrow_window_has_no_bar_across(person: ChatPage, language: str):
    person.page.set_viewport_size({"width": 360, "height": 740})
    person.page.evaluate(f"localStorage.setItem('llama.settings', JSON.stringify({{language: '{language}'}}))")
    person.page.reload()
    person.ask("What is the formula?")
    person.last_answer.locator(".katex").nth(3).wait_for()
    assert person.page.evaluate("document.documentElement.scrollWidth") == 360
    assert person.page.evaluate("document.querySelector('#scroll').scrollWidth") <= 360
    label = {"en": "Answer anew", "zh": "重新回答"}[language]
    assert person.last_answer.get_by_label(label).count() == 1
