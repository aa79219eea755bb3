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
SCRIPTS = [FORMULA, SKY, CHINESE, "and so on ", OTHERWISE]
ANSWERS = {"formula": FORMULA, "sky": SKY, "勾股": CHINESE, "endless": ENDLESS}


def says(prompt: str) -> str:
    """What is missing of an answer that stands at the prompt's end; else the answer to its last question."""
    question, _, begun = prompt.rpartition("[/INST]")
    known = [(question.rfind(word), answer) for word, answer in ANSWERS.items() if word in question]
    answer = max(known)[1] if known else SKY
    begun = begun.lstrip()
    if not begun:
        return answer
    return answer[len(begun) :] if answer.startswith(begun) else OTHERWISE
