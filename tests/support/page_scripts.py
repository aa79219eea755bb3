"""What the model of these tests says, by a word of what it is asked."""

FORMULA = r"""The **quadratic formula**, for $a x^2 + b x + c = 0$ with \(a \ne 0\):

$$x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}$$

and \[ \int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2} \]

| method | steps |
|---|---:|
| formula | 3 |

```python
def roots(a, b, c):
    return (b * b - 4 * a * c) ** 0.5
```

It costs $5 and $10.
"""
SKY = "The sky is blue because air scatters blue light."
CHINESE = "勾股定理:**直角三角形**两直角边的平方和等于斜边的平方。"
ENDLESS = "and so on " * 700
OTHERWISE = " that is another story."
HOSTILE = """Look: <script>parent.hit = 1</script> <img src=x onerror="parent.hit = 1">
![remote](https://elsewhere.example/pixel.png) [click](javascript:parent.hit=1)
[data](data:text/html,<script>1</script>)
<style>body { display: none }</style> <iframe src="https://elsewhere.example"></iframe> \x1b[31mred\x1b[0m
<a href="https://elsewhere.example" onmouseover="parent.hit = 1">over</a> [fine](https://elsewhere.example/)

$\\href{javascript:parent.hit=1}{x}$ $\\includegraphics{https://elsewhere.example/p.png}$ 
$\\fcolorbox{red}{blue}{y}$ $\\pmb{z}$

<svg onload="parent.hit = 1"></svg> H<sub>2</sub>O <b>bold</b> <b onclick="parent.hit = 1">no</b>

```html
<script>parent.hit = 1</script>
```
"""
SCRIPTS = [HOSTILE, FORMULA, SKY, CHINESE, "and so on ", OTHERWISE]
ANSWERS = {"hostile": HOSTILE, "formula": FORMULA, "sky": SKY, "勾股": CHINESE, "endless": ENDLESS}


def says(prompt: str) -> str:
    """What is missing of an answer that stands at the prompt's end; else the answer to its last question.

    In a plain text a question ends with a colon.
    """
    question, _, begun = prompt.rpartition("[/INST]") if "[/INST]" in prompt else prompt.partition(": ")
    known = [(question.rfind(word), answer) for word, answer in ANSWERS.items() if word in question]
    answer = max(known)[1] if known else SKY
    begun = begun.lstrip()
    if not begun:
        return answer
    return answer[len(begun) :] if answer.startswith(begun) else OTHERWISE
