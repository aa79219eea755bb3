"""The state of the server in words: it loads, is busy, stops, is gone, is locked; and the page waits and asks again."""

import threading

from playwright.sync_api import Page
from support.browser import ChatPage, forget
from support.page_scripts import SCRIPTS, SKY, says
from support.scripted import scripted_llm
from support.server import serving

from llama import Llama


def state(chat: ChatPage, words: str) -> None:
    chat.find("#state", has_text=words).wait_for()


def opened(window: Page, url: str) -> ChatPage:
    forget(window, url)
    chat = ChatPage(window, url)
    window.goto(url)
    return chat


def test_a_question_waits_while_the_model_loads_and_while_the_server_is_gone(window: Page, free_port: int):
    may_load = threading.Event()

    def build() -> Llama:
        may_load.wait(60)
        return scripted_llm(SCRIPTS, says)

    url = f"http://127.0.0.1:{free_port}"
    may_end = threading.Event()

    def serve() -> None:
        with serving(build, port=free_port):
            may_end.wait(60)

    server = threading.Thread(target=serve)
    server.start()
    chat = opened(window, url)
    try:
        state(chat, "The model is loading")
        chat.write("Why is the sky blue?")
        chat.find("article .note", has_text="The model is loading").wait_for()
        may_load.set()
        chat.wait_for_texts(["Why is the sky blue?", SKY])
        chat.until("document.querySelector('#state').hidden")
    finally:
        may_load.set()
        may_end.set()
        server.join()
    state(chat, "cannot be reached")
    chat.write("And why is the sky blue?")
    chat.find("article .note", has_text="cannot be reached").wait_for()
    with serving(lambda: scripted_llm(SCRIPTS, says), port=free_port):
        chat.wait_for_texts(["Why is the sky blue?", SKY, "And why is the sky blue?", SKY])


def test_a_place_in_line_a_full_server_and_one_that_stops_are_told(window: Page):
    def build() -> Llama:
        llm = scripted_llm(SCRIPTS, says)
        llm.engine.scheduler.max_running = 1
        return llm

    with serving(build, max_queue=2, shutdown_timeout=0) as running:
        chat = opened(window, running.url)
        endless = {"model": "m", "messages": [{"role": "user", "content": "endless"}], "stream": True}
        busy = [running.open("POST", "/v1/chat/completions", endless)]
        chat.write("Why is the sky blue?")
        chat.find("article .note", has_text="In line, at place 1").wait_for()
        window.keyboard.press("Escape")
        chat.wait_for_end()
        threading.Thread(target=lambda: busy.append(running.open("POST", "/v1/chat/completions", endless))).start()
        while running.call(lambda: len(running.server.engine.streams)) < 2:
            window.wait_for_timeout(20)
        chat.act(chat.last_answer, "regenerate")
        chat.find("article .note", has_text="The server is busy").wait_for()
        window.keyboard.press("Escape")
        running.call(lambda: setattr(running.server, "is_draining", True))
        state(chat, "The server is stopping")
        running.call(lambda: setattr(running.server, "is_draining", False))
        for response in busy:
            response.close()
