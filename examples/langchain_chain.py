"""A LangChain chain of two questions to the model: one writes a text, the next sums it up as it comes.

llama serve                          # in another terminal
pip install langchain-openai
python examples/langchain_chain.py
"""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    base_url="http://127.0.0.1:8000/v1", api_key="none", model="default", temperature=0, max_completion_tokens=128
)
explain = ChatPromptTemplate.from_template("Explain in three sentences what {thing} is.") | model | StrOutputParser()
shorten = ChatPromptTemplate.from_template("Say this in one short sentence:\n\n{text}") | model | StrOutputParser()
chain = {"text": explain} | shorten

for piece in chain.stream({"thing": "rain"}):
    print(piece, end="", flush=True)
print()
