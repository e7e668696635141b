"""Requests that choose for themselves: the server's budget, a larger one, the whole cache, and one that is refused.

Start the server as the README says (models/reasoner-dev), then: python examples/per_request.py [URL]
"""

import sys

from openai import BadRequestError, OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
QUESTION = "i>e;t>o;e>i;o>t;?t60"


def ask(client: OpenAI, treatment: object) -> str:
    """Return the reply to a request that asks for a treatment; None leaves it to the server."""
    custom = {} if treatment is None else {"custom_params": {"kv_evict": treatment}}
    reply = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=400,
        extra_body=custom,
    )
    return reply.choices[0].message.content or ""


def main() -> None:
    """Ask the same question four times."""
    client = OpenAI(base_url=f"{URL}/v1", api_key="unused")
    for treatment in (None, {"budget": 96}, "none"):
        print(f"{treatment!s:>15}: ...{ask(client, treatment)[-20:]}")
    try:
        ask(client, {"budget": 1_000_000})
    except BadRequestError as error:
        print(f"        refused: {error.status_code}: {error.body}")


if __name__ == "__main__":
    main()
