"""Takes facts out of a text, as an object of a class. The server keeps the answer to the class's schema.

llama serve                          # in another terminal
pip install openai
python examples/extract_json.py
"""

from openai import OpenAI
from pydantic import BaseModel, Field

TEXT = "Ada Lovelace was born in London in 1815. She wrote the first program, and liked horses and music."


class Person(BaseModel):
    name: str = Field(max_length=40)  # a small model that rambles is stopped by limits
    born: int = Field(ge=1000, le=2100)
    likes: list[str] = Field(max_length=3)


client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
answer = client.chat.completions.parse(
    model="default",
    messages=[
        {"role": "system", "content": "Take what is asked for out of the text. Answer in JSON."},
        {"role": "user", "content": f"{TEXT}\n\nWho is it, when was she born, and what did she like?"},
    ],
    response_format=Person,
    temperature=0,
    max_tokens=200,
)
person = answer.choices[0].message.parsed
print(f"{person.name}, born in {person.born}, likes {', '.join(person.likes)}")
