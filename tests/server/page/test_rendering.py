"""What a model writes is shown and never obeyed, in whatever pieces it comes."""

import pytest
from brs_kb import get_all_payloads
from playwright.sync_api import expect
from support.browser import ChatPage
from support.page_scripts import FORMULA

PAYLOADS = sorted({entry["payload"] for entry in get_all_payloads().values()})
SAMPLE = PAYLOADS[::30]
WATCH = """() => {
    window.hit = 0;
    window.markdown = new URL("markdown.js", document.querySelector("script[type=module]").src);
    for (const name of ["alert", "confirm", "prompt", "print", "open"]) window[name] = () => { window.hit += 1; };
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
}"""
RENDER = """async ([texts, step]) => {
    const { MarkdownView } = await import(window.markdown);
    const place = document.body.appendChild(document.createElement("div"));
    const tags = /^(script|style|iframe|object|embed|img|form|base|link|meta|svg|video|audio)$/i;
    const isCode = /^\\s*(javascript|data|vbscript):/i;
    const isBadAttribute = ({ name, value }) => /^on|^srcdoc$/.test(name) || isCode.test(value);
    const isBad = (node) => tags.test(node.tagName) || [...node.attributes].some(isBadAttribute);
    const bad = [];
    for (const text of texts) {
        const view = new MarkdownView(place.appendChild(document.createElement("div")));
        for (let end = step; end < text.length; end += step) view.update(text.slice(0, end), false);
        view.update(text, true);
        const nodes = [...view.node.querySelectorAll("*")].filter((node) => !node.closest(".katex, button"));
        if (nodes.some(isBad)) bad.push(text);
        for (const type of ["mouseover", "focus", "load"]) nodes.forEach((node) => node.dispatchEvent(new Event(type)));
        view.node.remove();
    }
    await new Promise((resolve) => setTimeout(resolve, 200));
    return { bad, hit: window.hit, violations: window.violations };
}"""


def rendered(person: ChatPage, payloads: list[str], step: int) -> None:
    person.page.evaluate(WATCH)
    asked = len(person.asked)
    found = person.page.evaluate(RENDER, [payloads, step])
    assert found == {"bad": [], "hit": 0, "violations": []}
    assert all("/vendor/" in url or url.endswith("/v1/models") for url in person.asked[asked:])


def test_nothing_that_attacks_pages_runs(person: ChatPage):
    assert len(SAMPLE) > 100
    rendered(person, SAMPLE, step=9)


@pytest.mark.slow
def test_none_of_thousands_of_attacks_runs(person: ChatPage):
    rendered(person, PAYLOADS, step=9)


def test_a_hostile_answer_is_text(person: ChatPage):
    person.page.evaluate(WATCH)
    answer = person.ask("Say the hostile thing")
    answer.locator(".katex").first.wait_for()
    text = answer.locator(".prose").text_content()
    assert '<script>parent.hit = 1</script> <img src=x onerror="parent.hit = 1">' in text
    assert "remote (https://elsewhere.example/pixel.png)" in text
    assert answer.locator(".prose :is(img, script, style, iframe, svg:not(button svg))").count() == 0
    links = [link.get_attribute("href") for link in answer.locator(".prose a").all()]
    assert set(links) <= {None, "https://elsewhere.example", "https://elsewhere.example/"}
    assert answer.locator("a[href$='example/']").get_attribute("rel") == "noopener noreferrer nofollow"
    expect(answer.locator("sub")).to_have_text("2", use_inner_text=True)
    assert person.page.evaluate("[window.hit, window.violations]") == [0, []]


def test_a_text_looks_the_same_in_pieces_as_at_once(person: ChatPage):
    look = """async ([text, step]) => {
        const { MarkdownView } = await import(window.markdown);
        const looks = [];
        for (const size of [step, text.length]) {
            const node = document.createElement("div");
            const view = new MarkdownView(node);
            for (let end = size; end < text.length; end += size) view.update(text.slice(0, end), false);
            view.update(text, true);
            const isThere = () => node.querySelector(".hljs-keyword") && node.querySelectorAll(".katex").length > 3;
            while (!isThere()) await new Promise((resolve) => setTimeout(resolve, 20));
            looks.push(node.innerHTML);
        }
        return looks;
    }"""
    person.page.evaluate(WATCH)
    pieces, whole = person.page.evaluate(look, [FORMULA, 3])
    assert pieces == whole


def test_what_is_finished_is_not_made_anew_while_more_comes(person: ChatPage):
    kept = """async (text) => {
        const { MarkdownView } = await import(window.markdown);
        const node = document.createElement("div");
        const view = new MarkdownView(node);
        view.update("first\\n\\nsecond\\n\\nthird", false);
        const [first] = node.children;
        view.update("first\\n\\nsecond\\n\\nthird and\\n\\n```py\\nx = 1", false);
        const code = node.querySelector("pre");
        view.update("first\\n\\nsecond\\n\\nthird and\\n\\n```py\\nx = 1\\ny = 2", false);
        return [node.children[0] === first, node.querySelector("pre") === code, code.textContent];
    }"""
    person.page.evaluate(WATCH)
    assert person.page.evaluate(kept) == [True, True, "x = 1\ny = 2"]
