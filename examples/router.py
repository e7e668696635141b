"""Several servers with eviction behind SGLang's router: requests go through it, control goes past it.

The router hands requests on without ``custom_params`` and drops ``X-KV-Evict``; what a request asks for travels in the
header ``X-Request-Id-KV-Evict``. It has no route for ``/kv_evict``: each server is told by its own address.

The commands that start both are in docs/guide.md (Behind a router), then: python examples/router.py ROUTER SERVER ...
"""

import json
import sys
import urllib.request

QUESTION = "<bos>i>e;t>o;e>i;o>t;?t60|"  # a walk on a graph: 60 steps from t; models/reasoner-dev writes every step
BUDGET = 40


def call(url: str, body: object = None, **headers: str) -> dict:
    """Send a request (POST where there is a body) and return the JSON of the answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data, {"content-type": "application/json", **headers})
    with urllib.request.urlopen(request) as reply:
        found: dict = json.load(reply)
    return found


def main() -> None:
    """Ask through the router, change all servers, and say what each has done."""
    router, *servers = sys.argv[1:]
    body = {"text": QUESTION, "sampling_params": {"temperature": 0, "max_new_tokens": 160}}
    for asked in ("on", json.dumps({"budget": 96}), "none"):
        told = call(f"{router}/generate", body, X_Request_Id_KV_Evict=asked)["meta_info"].get("kv_evict")
        print(f"{asked}: {told}")
    for server in servers:
        changed = call(f"{server}/kv_evict", {"budget": {"tokens": BUDGET}})["changed"]
        print(f"{server} changed {changed}")
    for _ in servers:
        told = call(f"{router}/generate", body)["meta_info"]["kv_evict"]
        print(f"on: {told}")
    for server in servers:
        for state in call(f"{server}/server_info")["internal_states"]:
            found = state["lethe"]
            print(f"{server} dp_rank {found['dp_rank']}: budget {found['budget_tokens']}, {found['rounds']} rounds")


if __name__ == "__main__":
    main()
