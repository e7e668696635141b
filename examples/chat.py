"""Ask a server with eviction over the OpenAI API, and read from it what eviction did.

Start the server as the README says (models/reasoner-dev), then: python examples/chat.py [URL]
"""

import json
import sys
import urllib.request

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
QUESTION = "i>e;t>o;e>i;o>t;?t60"  # a walk on a graph: 60 steps from t; models/reasoner-dev writes every step


def main() -> None:
    """Stream one reply, then print the server's eviction counters."""
    client = OpenAI(base_url=f"{URL}/v1", api_key="unused")
    stream = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=400,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    with urllib.request.urlopen(f"{URL}/server_info") as reply:
        eviction = json.load(reply)["internal_states"][0]["lethe"]
    print(f"\nsince its start: {eviction['rounds']} rounds, {eviction['blocks_freed_total']} blocks freed")


if __name__ == "__main__":
    main()
