"""Ask about a picture: ``python examples/image.py photo.jpg [question]``."""

import base64
import mimetypes
import sys
from pathlib import Path

from openai import OpenAI


def main() -> None:
    path = Path(sys.argv[1])
    question = " ".join(sys.argv[2:]) or "What is in this picture?"
    media_type = mimetypes.guess_type(path)[0] or "image/jpeg"
    data = base64.b64encode(path.read_bytes()).decode()
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    completion = client.chat.completions.create(
        model=client.models.list().data[0].id,
        max_tokens=100,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}},
                    {"type": "text", "text": question},
                ],
            }
        ],
    )
    print(completion.choices[0].message.content)


if __name__ == "__main__":
    main()
