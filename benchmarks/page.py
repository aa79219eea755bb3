"""How soon the chat page is there, and whether it stays responsive while an answer streams into a long conversation.

    python benchmarks/page.py                 # needs Chromium and requirements-test.txt

A server of a tiny model serves the page, which a Chromium without a window opens. The figures:

    load        from the click to the page's own `load` event, and to the moment when it can be typed into, in
                milliseconds: the first time, and again with the files in the browser's cache (median of --loads)
    open        a conversation of --messages messages (default 200), each a paragraph, a formula, a table and code,
                from the click to the first frame that shows it
    stream      the same conversation while --rate tokens a second (default 100) come in for --seconds: tasks of the
                page's main thread over 50 ms, the longest frame, and the share of frames that came late (over 34 ms);
                and the thread's own time, by Chromium's trace: of all, of the longest task, of those over 50 ms

The last line is JSON. On a machine that does something else as well, tasks take longer and frames come late for that
reason too; `cpu_ms` and what follows it count only what the thread itself did.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Browser, Page

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from support.browser import ChatPage, started_chromium
from support.page_scripts import FORMULA, SCRIPTS
from support.scripted import scripted_llm
from support.server import Running, serving

from llama import Llama

WATCH = """() => {
    window.tasks = [];
    window.frames = [];
    new PerformanceObserver((list) => tasks.push(...list.getEntries().map((entry) => entry.duration)))
        .observe({ type: "longtask", buffered: false });
    let last = performance.now();
    const tick = (now) => { frames.push(now - last); last = now; requestAnimationFrame(tick); };
    requestAnimationFrame(tick);
}"""
TYPABLE = "document.activeElement.id === 'composer-text' && performance.now()"


def loads(browser: Browser, url: str, number: int) -> dict[str, float]:
    firsts, agains, typables = [], [], []
    for _ in range(number):
        context = browser.new_context()
        page = context.new_page()
        for times in (firsts, agains):
            page.goto(url)
            page.wait_for_selector("#model-name:not(:empty)")
            times.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
        page.goto("about:blank")
        page.goto(url, wait_until="commit")
        while not (typable := page.evaluate(TYPABLE)):
            pass
        typables.append(typable)
        context.close()
    figures = {"first": firsts, "again": agains, "typable_again": typables}
    return {name: round(statistics.median(times)) for name, times in figures.items()}


def conversation(num_messages: int) -> str:
    """As the page exports one."""
    messages: list[dict[str, Any]] = []
    parent = None
    for i in range(num_messages):
        role = "assistant" if i % 2 else "user"
        content = FORMULA if i % 2 else f"Question {i}: what is the formula?"
        message = {"id": str(uuid.uuid4()), "parent": parent, "role": role, "content": content, "created": i}
        messages.append(message | {"finish": "stop"})
        parent = message["id"]
    info = {"id": "long", "title": "A long one", "created": 0, "updated": 0, "pinned": False, "leaf": parent}
    return json.dumps({"format": "llama-conversations", "version": 1, "conversations": [info | {"messages": messages}]})


def opened(chat: ChatPage, num_messages: int) -> float:
    """Milliseconds until a long conversation is shown."""
    content = conversation(num_messages).encode()
    chat.page.set_input_files("#import-file", [{"name": "l.json", "mimeType": "application/json", "buffer": content}])
    row = chat.find("#conversations .open", has_text="A long one")
    row.wait_for()
    chat.page.evaluate(
        """() => {
            const row = [...document.querySelectorAll("#conversations .open")].find((one) => one.textContent === "A long one");
            window.clicked = performance.now();
            const look = () => document.querySelector("article:last-child .katex")
                ? (window.shown = performance.now()) : requestAnimationFrame(look);
            row.click();
            requestAnimationFrame(look);
        }"""  # noqa: E501
    )
    chat.until("window.shown")
    return round(chat.page.evaluate("shown - clicked"))


@contextmanager
def traced(page: Page) -> Iterator[list[dict[str, Any]]]:
    """Chromium's trace of a block, complete behind it."""
    events: list[dict[str, Any]] = []
    ended: list[Any] = []
    session = page.context.browser.new_browser_cdp_session()
    session.on("Tracing.dataCollected", lambda part: events.extend(part["value"]))
    session.on("Tracing.tracingComplete", lambda told: ended.append(told))
    session.send("Tracing.start", {"traceConfig": {"includedCategories": ["toplevel"]}, "transferMode": "ReportEvents"})
    yield events
    session.send("Tracing.end")
    while not ended:
        page.wait_for_timeout(20)
    session.detach()


def main_thread_ms(events: list[dict[str, Any]]) -> list[float]:
    """What each task of the busiest page's main thread took of a processor, in milliseconds."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    tasks: dict[tuple[int, int], list[float]] = {}
    for event in events:
        thread = (event["pid"], event["tid"])
        if event["name"].endswith("RunTask") and names.get(thread) == "CrRendererMain":
            tasks.setdefault(thread, []).append(event.get("tdur", 0) / 1000)
    return max(tasks.values(), key=sum)


def streamed(page: Page, chat: ChatPage, seconds: float) -> dict[str, Any]:
    page.evaluate(WATCH)
    chat.write("Write on, without an end")
    chat.until("document.querySelector('article:last-child .prose')?.textContent.length > 20")
    page.evaluate("tasks.length = frames.length = 0")
    before = page.evaluate("document.querySelector('article:last-child .numbers').textContent")
    with traced(page) as events:
        page.wait_for_timeout(seconds * 1000)
    own = main_thread_ms(events)
    tasks, frames = page.evaluate("[tasks, frames]")
    after = page.evaluate("document.querySelector('article:last-child .numbers').textContent")
    page.keyboard.press("Escape")
    chat.wait_for_end()
    return {
        "shown_before": before,
        "shown_after": after,
        "long_tasks_ms": [round(task) for task in tasks],
        "longest_frame_ms": round(max(frames)),
        "late_frames": round(sum(frame > 34 for frame in frames) / len(frames), 3),
        "num_frames": len(frames),
        "cpu_ms": round(sum(own)),
        "longest_cpu_ms": round(max(own)),
        "long_cpu_ms": [round(task) for task in own if task > 50],
    }


def paced(rate: float) -> Llama:
    """A model that answers without an end, `rate` tokens a second."""
    llm = scripted_llm(SCRIPTS, lambda prompt: FORMULA * 100, max_seq_len=65536)
    step = llm.engine.step
    due = [time.perf_counter()]

    def slow_step() -> Any:
        due[0] = max(due[0] + 1 / rate, time.perf_counter() - 0.1)  # what was late is made up for, up to a point
        time.sleep(max(0.0, due[0] - time.perf_counter()))
        return step()

    llm.engine.step = slow_step
    return llm


def measure(running: Running, given: argparse.Namespace) -> dict[str, Any]:
    with started_chromium() as browser:
        figures: dict[str, Any] = {"load_ms": loads(browser, running.url, given.loads)}
        page = browser.new_page(viewport={"width": 1200, "height": 850})
        chat = ChatPage(page, running.url).open()
        figures["open_ms"] = opened(chat, given.messages)
        figures["stream"] = streamed(page, chat, given.seconds)
        assert chat.complaints == [], chat.complaints
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--messages", type=int, default=200)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with serving(lambda: paced(given.rate), quiet=True) as running:
        figures = measure(running, given)
    for name, value in figures.items():
        print(f"{name:10} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
