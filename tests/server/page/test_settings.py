"""Settings reach the server as they are given, presets come and go as text-generation-webui's, words change at once."""

import json

from playwright.sync_api import Page, expect
from support.browser import ChatPage, forget
from support.page_scripts import SCRIPTS, SKY, says
from support.scripted import scripted_llm
from support.server import serving


def body_of(person: ChatPage, question: str = "Why is the sky blue?") -> dict:
    with person.page.expect_request("**/v1/chat/completions") as asked:
        person.ask(question)
    return json.loads(asked.value.post_data)


def set_field(person: ChatPage, name: str, value: str) -> None:
    person.find(f"#setting-{name}").fill(value)
    person.find(f"#setting-{name}").blur()


def test_every_field_of_the_sampler_is_sent_as_it_was_given(person: ChatPage):
    assert not {"temperature", "top_p", "stop", "seed"} & body_of(person).keys()  # the model's own
    person.find("#open-settings").click()
    given = dict(temperature="0.5", top_p="0.9", top_k="40", min_p="0.1", repetition_penalty="1.1", max_tokens="5")
    given |= dict(presence_penalty="0.2", frequency_penalty="-0.3", min_tokens="2", seed="7")
    for name, value in given.items():
        set_field(person, name, value)
    set_field(person, "stop", "END\na\\nb")
    set_field(person, "stop_token_ids", "3, 4")
    set_field(person, "logit_bias", "5: -1.5")
    person.find("#setting-ignore_eos").check()
    person.page.keyboard.press("Escape")
    body = body_of(person)
    assert {name: body[name] for name in given} == {name: float(value) for name, value in given.items()}
    assert (body["stop"], body["stop_token_ids"]) == (["END", "a\nb"], [3, 4])
    assert (body["logit_bias"], body["ignore_eos"]) == ({"5": -1.5}, True)
    expect(person.last_answer.locator(".note")).to_contain_text("reached its most tokens", use_inner_text=True)


def test_every_field_has_its_meaning_in_a_sentence(person: ChatPage):
    person.find("#open-settings").click()
    hints = person.find("#group-sampling .field small")
    expect(hints).to_have_count(14)
    assert all(hint.endswith(".") for hint in hints.all_inner_texts())


def test_what_cannot_be_understood_is_not_taken(person: ChatPage):
    person.find("#open-settings").click()
    set_field(person, "logit_bias", "five")
    assert person.page.evaluate("document.querySelector('#setting-logit_bias').validity.customError")
    person.find("#group-shape summary").click()
    set_field(person, "schema", "[1]")
    assert person.page.evaluate("document.querySelector('#setting-schema').validity.customError")
    person.page.keyboard.press("Escape")
    assert not {"logit_bias", "response_format"} & body_of(person).keys()


def test_presets_are_saved_and_come_and_go_as_files(person: ChatPage, tmp_path):
    person.find("#open-settings").click()
    (tmp_path / "Odd.yaml").write_text("temperature: 0.7\nmin_p: 0.05\nmirostat_mode: 2\ntypical_p: 1.0\ntop_k: 20\n")
    person.page.set_input_files("#preset-file", tmp_path / "Odd.yaml")
    toast = person.find("#toasts p", has_text="Odd")
    assert toast.inner_text().endswith("without what is not served here: mirostat_mode")
    expect(person.find("#setting-preset")).to_have_value("Odd")
    expect(person.find("#setting-min_p")).to_have_value("0.05")
    with person.page.expect_download() as taken:
        person.find("#preset-exportOne").click()
    taken.value.save_as(tmp_path / "out.yaml")
    assert (tmp_path / "out.yaml").read_text() == "temperature: 0.7\ntop_k: 20\nmin_p: 0.05\n"
    set_field(person, "temperature", "0.3")
    person.find("#preset-save").click()
    person.find("dialog.small input").fill("Mine")
    person.page.keyboard.press("Enter")
    person.find("#setting-preset").select_option("Deterministic")
    expect(person.find("#setting-temperature")).to_have_value("0")
    person.find("#setting-preset").select_option("Mine")
    person.page.keyboard.press("Escape")
    assert body_of(person)["temperature"] == 0.3


def test_a_schema_and_tools_are_sent_and_calls_are_answered_by_hand(person: ChatPage):
    schema = {"type": "object"}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    bodies = []

    def answer(route) -> None:
        bodies.append(route.request.post_data_json)
        pieces = [{"index": 0, "id": "c1", "function": {"name": "weather", "arguments": '{"ci'}}]
        rest = [{"index": 0, "function": {"arguments": 'ty": "Bern"}'}}]
        said = [{"tool_calls": pieces}, {"tool_calls": rest}] if len(bodies) == 1 else [{"content": "It rains."}]
        finish = "tool_calls" if len(bodies) == 1 else "stop"
        choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in said]
        choices.append({"index": 0, "delta": {}, "finish_reason": finish})
        lines = [f"data: {json.dumps({'model': 'm', 'choices': [choice]})}\n\n" for choice in choices]
        route.fulfill(body="".join(lines) + "data: [DONE]\n\n", content_type="text/event-stream")

    person.find("#open-settings").click()
    person.find("#group-shape summary").click()
    set_field(person, "schema", json.dumps(schema))
    person.find("#group-tools summary").click()
    set_field(person, "tools", json.dumps(tools))
    person.page.keyboard.press("Escape")
    person.page.route("**/v1/chat/completions", answer)
    person.ask("What is the weather?")
    expect(person.last_answer.locator(".calls pre")).to_have_text('weather({"city": "Bern"})', use_inner_text=True)
    person.last_answer.locator(".calls button").click()
    person.find("dialog textarea").fill("rain")
    person.find("dialog button.main").click()
    person.wait_for_end()
    person.page.unroute("**/v1/chat/completions")
    assert bodies[0]["tools"] == tools
    assert bodies[0]["response_format"]["json_schema"]["schema"] == schema
    _, called, result = bodies[1]["messages"]
    assert called["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    expect(person.last_answer.locator(".prose")).to_have_text("It rains.", use_inner_text=True)


def test_the_language_and_the_theme_change_at_once_and_stay(person: ChatPage):
    person.find("#open-settings").click()
    person.find("#setting-theme").select_option("dark")
    person.find("#setting-language").select_option("zh")
    expect(person.find("dialog h2")).to_have_text("设置")
    person.page.keyboard.press("Escape")
    person.page.reload()
    expect(person.find("#new-chat")).to_have_text("新对话")
    assert person.page.evaluate("document.documentElement.lang") == "zh-CN"
    background = person.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in background[4:-1].split(",")) < 150


def test_a_locked_server_asks_for_its_key_which_is_forgotten_with_the_tab(window: Page):
    with serving(lambda: scripted_llm(SCRIPTS, says), api_key=["secret"]) as running:
        forget(window, running.url)
        chat = ChatPage(window, running.url)
        window.goto(running.url)
        chat.find("#state", has_text="asks for an API key").wait_for()
        chat.find("#open-settings").click()
        set_field(chat, "apiKey", "secret")
        window.keyboard.press("Escape")
        chat.until("document.querySelector('#state').hidden")
        expect(chat.ask("Why is the sky blue?").locator(".prose")).to_have_text(SKY, use_inner_text=True)
        assert "secret" not in window.evaluate("JSON.stringify(localStorage)")


def test_an_instruction_template_is_one_of_the_servers_or_pasted(person: ChatPage):
    person.find("#open-settings").click()
    person.find("#group-template summary").click()
    shown = person.find("#group-template pre")
    shown.get_by_text("<s>[INST] What is a llama? [/INST]").wait_for()
    person.find("#setting-template").select_option("pasted")
    set_field(person, "templateText", "{% for message in messages %}")
    shown.get_by_text("line 1").wait_for()  # what the server says is wrong with it
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }};{% endfor %}[/INST]"
    set_field(person, "templateText", template)
    shown.get_by_text("user: What is a llama?;[/INST]").wait_for()
    person.page.keyboard.press("Escape")
    assert body_of(person)["chat_template"] == template
    expect(person.last_answer.locator(".prose")).to_have_text(SKY, use_inner_text=True)
    person.act(person.last_answer, "raw")
    expect(person.last_answer.locator(".panel pre").first).to_have_text(
        "<s>user: Why is the sky blue?;[/INST]", use_inner_text=True
    )
    person.find("#open-settings").click()
    person.find("#setting-template").select_option("llama2")
    shown.get_by_text("<s>[INST] What is a llama? [/INST]").wait_for()
    person.page.keyboard.press("Escape")
    assert body_of(person)["chat_template"] == "llama2"
    person.complaints[:] = [text for text in person.complaints if "status of 400" not in text]


def test_an_answer_in_another_template_goes_on_in_it(person: ChatPage):
    template = "{% for message in messages %}{{ message.content }}{% if not loop.last %};{% endif %}{% endfor %}[/INST]"
    stored = json.dumps({"template": template})
    person.page.evaluate("(stored) => localStorage.setItem('llama.settings', stored)", stored)
    person.page.reload()
    person.ask("Why is the sky blue?")
    with person.page.expect_request("**/v1/chat/completions") as asked:
        person.act(person.last_answer, "continue")
    person.wait_for_end()
    body = json.loads(asked.value.post_data)
    assert (body["chat_template"], body["continue_final_message"]) == (template, True)
    assert body["messages"][-1] == {"role": "assistant", "content": SKY}
