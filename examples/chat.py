"""Stream an answer from a running server: ``python examples/chat.py [question]``."""

import sys

from openai import OpenAI


def main() -> None:
    question = " ".join(sys.argv[1:]) or "What is the capital of France?"
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
