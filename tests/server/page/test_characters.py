"""Characters come and go as text-generation-webui's files and as cards; the modes read what that project's do."""

import base64
import json
import struct
import zlib

import pytest
from playwright.sync_api import expect
from support.browser import ChatPage
from support.page_scripts import SKY

PERSONA = "Ada's Persona: patient\nScenario: a school\n{{user}}: Hi\n{{char}}: Hello"
CARD = {
    "name": "Ada",
    "description": "patient",
    "scenario": "a school",
    "mes_example": "{{user}}: Hi\n{{char}}: Hello",
    "first_mes": "Welcome, {{user}}.",
}


def png(**texts: str) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))]
    parts += [chunk(b"tEXt", f"{name}\0{text}".encode("latin-1")) for name, text in texts.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IEND", b"")])


def take(person: ChatPage, name: str, content: bytes) -> None:
    person.find("#open-characters").click()
    mime = "image/png" if name.endswith("png") else "text/plain"
    person.page.set_input_files("#character-file", [{"name": name, "mimeType": mime, "buffer": content}])
    person.find(".character .open[aria-pressed=true]").wait_for()


def saved(person: ChatPage, label: str) -> bytes:
    with person.page.expect_download() as taken:
        person.find(".character .row button", has_text=label).click()
    return taken.value.path().read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ada.yaml", f"name: Ada\ngreeting: Welcome, {{{{user}}}}.\ncontext: {json.dumps(PERSONA)}\n".encode()),
        ("ada.json", json.dumps(CARD).encode()),
        ("ada.json", json.dumps({"spec": "chara_card_v2", "data": CARD}).encode()),
        ("ada.png", png(chara=base64.b64encode(json.dumps(CARD).encode()).decode())),
    ],
)
def test_a_character_comes_from_any_file_and_goes_out_the_same(person: ChatPage, name: str, content: bytes):
    take(person, name, content)
    text = saved(person, "YAML").decode()
    assert text.startswith("name: Ada\ngreeting: Welcome, {{user}}.\n")
    card = saved(person, "Card")
    chunk = card[card.index(b"tEXtchara\0") + 10 :].split(b"IEND")[0][:-8]
    read = json.loads(base64.b64decode(chunk))
    assert (read["name"], read["first_mes"]) == ("Ada", "Welcome, {{user}}.")
    person.find(".character .row button", has_text="Edit").click()
    expect(person.find("#setting-context")).to_have_value(PERSONA)
    person.page.keyboard.press("Escape")
    person.find(".character").first.wait_for()
    take_again = person.find(".character").count()
    person.page.set_input_files("#character-file", [{"name": "c.png", "mimeType": "image/png", "buffer": card}])
    person.until(f"document.querySelectorAll('.character').length === {take_again + 1}")


def test_no_character_is_refused_in_words(person: ChatPage):
    person.find("#open-characters").click()
    for name, content in [("x.png", png()), ("x.yaml", b"{["), ("x.json", b"{}")]:
        person.page.set_input_files("#character-file", [{"name": name, "mimeType": "text/plain", "buffer": content}])
        person.find("#toasts p", has_text=f"{name}: this is no character").wait_for()


def test_chat_is_a_transcript_that_begins_with_the_greeting(person: ChatPage):
    take(person, "ada.json", json.dumps(CARD).encode())
    person.page.keyboard.press("Escape")
    person.find("article", has_text="Welcome, You.").wait_for()
    expect(person.last_answer.locator(".who")).to_have_text("Ada", use_inner_text=True)
    with person.page.expect_request("**/v1/completions") as asked:
        person.ask("Why is the sky blue?")
    body = json.loads(asked.value.post_data)
    context = "Ada's Persona: patient\nScenario: a school\nYou: Hi\nAda: Hello"
    assert body["prompt"] == f"{context}\n\nAda: Welcome, You.\nYou: Why is the sky blue?\nAda:"
    assert body["stop"] == ["\nYou:", "\nAda:"]
    person.act(person.last_answer, "raw")
    expect(person.last_answer.locator(".panel pre").first).to_have_text(body["prompt"], use_inner_text=True)


def test_chat_instruct_puts_the_transcript_into_an_instruction(person: ChatPage):
    take(person, "ada.json", json.dumps(CARD).encode())
    person.find("#mode-chat-instruct").check()
    person.find("#setting-command").fill("Speak as <|character|>:\n<|prompt|>")
    person.find("#setting-userName").fill("Grace")
    person.page.keyboard.press("Escape")
    person.find("article", has_text="Welcome, ").wait_for()  # the character's conversation is open
    with person.page.expect_request("**/v1/chat/completions") as asked:
        person.ask("Why is the sky blue?")
    [message] = json.loads(asked.value.post_data)["messages"]
    assert message["content"].startswith("Speak as Ada:\nAda's Persona: patient")
    assert message["content"].endswith("Ada: Welcome, Grace.\nGrace: Why is the sky blue?\n")
    assert person.texts()[-1] == SKY
    with person.page.expect_request("**/v1/chat/completions") as asked:
        person.ask("Why is the sky blue, again?")
    [message] = json.loads(asked.value.post_data)["messages"]
    assert message["content"].endswith(f"Ada: {SKY}\nGrace: Why is the sky blue, again?\n")


def test_a_new_conversation_is_open_before_its_greeting_is_saved(person: ChatPage):
    """What is typed meanwhile belongs into it, and not into the one that was open."""
    take(person, "ada.json", json.dumps(CARD).encode())
    person.page.keyboard.press("Escape")
    opened = person.page.evaluate(
        """async () => {
            const start = document.querySelector('script[type="module"]').src;
            const { chat, newConversation } = await import(new URL("chat.js", start));
            const before = chat.conversation;
            newConversation();
            return [chat.conversation !== before, chat.conversation.path().length];
        }"""
    )
    assert opened == [True, 1]


def test_instruct_knows_no_character(person: ChatPage):
    take(person, "ada.json", json.dumps(CARD).encode())
    person.find("#mode-instruct").check()
    person.page.keyboard.press("Escape")
    with person.page.expect_request("**/v1/chat/completions") as asked:
        person.ask("Why is the sky blue?")
    assert json.loads(asked.value.post_data)["messages"] == [{"role": "user", "content": "Why is the sky blue?"}]
