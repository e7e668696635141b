"""Forces the same replies with the full cache and with every arm, on one live server; resumable at any kill."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from tqdm import tqdm

from lethe_bench.accuracy.experiment import Arm
from lethe_bench.accuracy.live import check_server, switch
from lethe_bench.fidelity import loads, trajectory
from lethe_bench.fidelity.corpora import Document, code, prose, questions, recall
from lethe_bench.fidelity.worksheets import reasoning
from lethe_bench.servers import Server, ServerError, explained, launch_command
from lethe_bench.throughput.measure import parse_log, read_from
from lethe_sglang.cache.arrivals import stagger_of
from lethe_sglang.config import ConfigError, EvictionConfig, from_mapping
from lethe_sglang.config.loading import parse_yaml
from lethe_sglang.config.policy_section import laid_over
from lethe_sglang.config.section import Section
from lethe_sglang.errors import one_line
from lethe_sglang.files import Journal, write_atomically

OWN = "own"
"""The corpus of the model's own samples."""

CORPORA = {"prose": prose, "code": code, "recall": recall, "reasoning": reasoning}
"""Corpora that need no model."""

PROMPT = 512
"""Tokens that the longest prompt of a document may have."""

_LEGAL = {
    "tokens": "an integer from 64 to 16384",
    "corpora": f"a mapping from {', '.join((OWN, *CORPORA))} to numbers of documents >= 1",
    "split": "development or test",
    "trajectories": "an integer >= 0",
    "at_once": "an integer >= 1",
    "pool_tokens": f"an integer >= tokens + {PROMPT}, so that a document fits without eviction",
    "loads": "increasing integers >= 1, at most as many as there are documents, with pool_tokens, without trajectories",
    "arms": "a mapping from names to configurations",
}


class Point(NamedTuple):
    """All documents with one arm: so many of them at once, all of these together; None is ``at_once``, as they come."""

    arm: str
    load: int | None


class Experiment(Section):
    """What ``lethe eval fidelity`` reads from its YAML file."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    split: Literal["development", "test"] = "development"
    tokens: int = Field(default=1000, ge=64, le=16384)
    corpora: dict[str, int] = Field(default={OWN: 12, "prose": 12, "code": 12, "recall": 12})
    trajectories: int = Field(default=0, ge=0)
    at_once: int = Field(default=6, ge=1)
    pool_tokens: int | None = Field(default=None, ge=1)
    loads: list[int] = Field(default_factory=list, validate_default=True)
    base: dict[str, Any] = Field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = Field(min_length=1)

    @field_validator("corpora")
    @classmethod
    def _known(cls, corpora: dict[str, int]) -> dict[str, int]:
        if wrong := [name for name, count in corpora.items() if name not in (OWN, *CORPORA) or count < 1]:
            raise ValueError(f"{wrong[0]} is none, or has no documents")
        return corpora

    @field_validator("pool_tokens")
    @classmethod
    def _large(cls, pool: int | None, known: ValidationInfo) -> int | None:
        if pool is not None and pool < known.data.get("tokens", 0) + PROMPT:
            raise ValueError(f"got {pool}")
        return pool

    @field_validator("loads")
    @classmethod
    def _possible(cls, asked: list[int], known: ValidationInfo) -> list[int]:
        if bool(asked) != (known.data.get("pool_tokens") is not None):
            raise ValueError("pool_tokens and loads come together")
        if not asked:
            return asked
        if asked[0] < 1 or asked != sorted(set(asked)) or known.data.get("trajectories"):
            raise ValueError(f"got {asked}")
        if asked[-1] > (documents := sum(known.data.get("corpora", {OWN: asked[-1]}).values())):
            raise ValueError(f"got {asked[-1]}, but there are {documents} documents")
        return asked

    def points(self) -> dict[str, Point]:
        """Return what is forced with eviction: the name of its folder -> arm, and how many documents at once."""
        if not self.loads:
            return {arm: Point(arm, None) for arm in self.arms}
        return {loads.folder_of(arm, load): Point(arm, load) for load in self.loads for arm in self.arms}

    def configs(self) -> dict[str, EvictionConfig]:
        """Return the arms' configurations, each laid over ``base``."""
        return {name: from_mapping(laid_over(self.base, arm), where=f"arms.{name}") for name, arm in self.arms.items()}


def load(path: Path) -> Experiment:
    """Read an experiment.

    Raises
    ------
    ConfigError
        One line with every option at fault and what is legal.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the YAML file of an experiment") from None
    try:
        experiment = Experiment.model_validate(data)
    except ValidationError as error:
        found = []
        for finding in error.errors(include_url=False):
            option = str(finding["loc"][0]) if finding["loc"] else "the file"
            legal = _LEGAL.get(option, f"keys among {', '.join(Experiment.model_fields)}")
            found.append(f"{option}: {finding['msg'].removeprefix('Value error, ')}; expected {legal}")
        raise one_line([f"{path}: {'; '.join(found)}"]) from None
    experiment.configs()
    if not (experiment.corpora or experiment.trajectories):
        raise ConfigError(f"{path}: nothing to measure: give corpora some documents, or trajectories a number")
    return experiment


def facts(document: Document) -> dict[str, Any]:
    """Return what a report has to know of a document."""
    prompt = {"prompt": len(document.prompt), "stagger": stagger_of(document.prompt)}
    return {"name": document.name, **prompt, "values": [list(value) for value in document.values]}


@dataclass(kw_only=True)
class Run:
    """One pass over what is missing.

    Attributes
    ----------
    experiment
        What to run.
    model
        Directory of the model.
    out
        Results directory: ``full/`` has distributions (half precision, 2 bytes a step and word), a folder an arm the
        numbers of each step.
    port
        Where the server listens.
    server_args
        More arguments of it.
    say
        Takes one line of progress at a time.
    """

    experiment: Experiment
    model: Path
    out: Path
    port: int = 31000
    server_args: Sequence[str] = ()
    say: Callable[[str], None] = print

    def all(self) -> None:
        """Start the server, and force every reply that an arm lacks.

        Raises
        ------
        ConfigError
            If the directory holds results of another experiment.
        ServerError
            If the server fails; what was done before is kept.
        """
        from transformers import AutoTokenizer

        self.check_out()
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        documents, prompts = self.documents(tokenizer), self.prompts(tokenizer)
        known = self.samples(prompts)
        arms = ["full", *self.experiment.points()]
        asked = trajectory.prompts(tokenizer, self.experiment.split, self.experiment.trajectories)
        unanswered = any(trajectory.missing(self.out, arm, asked) for arm in arms)
        if unanswered or len(known) < len(prompts) or any(self.missing(arm, documents + known) for arm in arms):
            with Server(self._command(), self.port, self.out / "server.log") as server, explained(server):
                check_server(server, evicts=True)
                documents += self._sampled(server, prompts, tokenizer.eos_token_id)
                self.note(documents)
                for arm in arms:
                    self._force(server, arm, documents)
                    self._answer(server, arm, asked)

    def check_out(self) -> None:
        """Begin a results directory, or go on with it.

        Raises
        ------
        ConfigError
            If it holds results of another experiment.
        """
        may_change = {"loads", "arms", "at_once", "trajectories"}
        settings = self.experiment.model_dump(mode="json", exclude=may_change)
        if not self.experiment.loads:
            del settings["pool_tokens"]
        path = self.out / "experiment.json"
        kept = Journal(path).read()
        wanted = {**settings, "model": self.model.name}
        if kept and kept[0] != wanted:
            differ = [name for name in wanted if kept[0].get(name) != wanted[name]]
            raise ConfigError(
                f"--out {self.out}: holds results of another experiment (other {', '.join(differ)}); give another"
            )
        if not kept:
            Journal(path).add([wanted])
        arms, asked = Journal(self.out / "arms.jsonl"), self.experiment.arms
        before = {line["name"]: line["options"] for line in arms.read()}
        if changed := [name for name, options in asked.items() if before.get(name, options) != options]:
            raise ConfigError(
                f"--out {self.out}: arms.{changed[0]} was configured differently there; give it another name"
            )
        arms.add([{"name": name, "options": options} for name, options in asked.items() if name not in before])

    def whole(self, prompts: Iterable[Sequence[int]]) -> int:
        """Return how many documents at once the pool holds of which nothing is evicted, so that none waits."""
        experiment, longest = self.experiment, max(map(len, prompts), default=0)
        pool = experiment.pool_tokens
        return experiment.at_once if pool is None else min(experiment.at_once, pool // (experiment.tokens + longest))

    @property
    def longest(self) -> int:
        """Tokens that the longest document may have."""
        return self.experiment.tokens + PROMPT

    def _command(self) -> list[str]:
        experiment = self.experiment
        at_once = max([experiment.at_once, *experiment.loads])
        pool = experiment.pool_tokens or (at_once + 1) * self.longest
        first = next(iter(experiment.configs().values()))
        options = first.model_dump(mode="json") | {"pool": {"states": "all"}}
        config = self.out / "server.json"
        write_atomically(config, json.dumps(options))
        return launch_command(
            str(self.model),
            self.port,
            *("--kv-evict", first.policy, "--kv-evict-config", str(config), "--enable-custom-logit-processor"),
            *("--context-length", str(self.longest), "--max-running-requests", str(at_once)),
            *("--max-total-tokens", str(pool)),
            # A chunk of a prefill that is not the last would be taken for a step.
            *(("--decode-log-interval", "1", "--chunked-prefill-size", "-1") if experiment.loads else ()),
            "--disable-cuda-graph",  # a graph holds how a policy scores, and arms have several
            *self.server_args,
        )

    # -- documents ----------------------------------------------------------------------------------------------------

    def documents(self, tokenizer: Any) -> list[Document]:
        """Make the documents of all corpora but the model's own samples.

        Raises
        ------
        ConfigError
            If a corpus has too few of that length.
        """
        experiment, found = self.experiment, list[Document]()
        for name, count in experiment.corpora.items():
            if name != OWN:
                some = list(islice(CORPORA[name](tokenizer, experiment.split, experiment.tokens), count))
                if len(some) < count:
                    raise ConfigError(
                        f"corpora.{name}: got {count}, but there are {len(some)} documents of this length"
                    )
                found += some
        return found

    def note(self, documents: Sequence[Document]) -> None:
        """Keep what a report has to know of documents."""
        journal = Journal(self.out / "documents.jsonl")
        known = {line["name"] for line in journal.read()}
        journal.add([facts(document) for document in documents if document.name not in known])

    def prompts(self, tokenizer: Any) -> dict[str, list[int]]:
        """Return the prompts of the model's own samples by name, as token ids.

        Raises
        ------
        ConfigError
            If there are too few.
        """
        count = self.experiment.corpora.get(OWN, 0)
        prompts = dict(islice(questions(tokenizer, self.experiment.split), count))
        if len(prompts) < count:
            raise ConfigError(f"corpora.{OWN}: got {count}, but there are {len(prompts)} questions")
        return prompts

    def samples(self, prompts: dict[str, list[int]]) -> list[Document]:
        """Return the own samples that exist already."""
        known = {line["name"]: line["reply"] for line in Journal(self.out / "samples.jsonl").read()}
        return [Document(name, prompt, known[name]) for name, prompt in prompts.items() if name in known]

    def _sampled(self, server: Server, prompts: dict[str, list[int]], eos: int) -> list[Document]:
        """Let the model write replies of its own, with the full cache, once; they are forced like all others."""
        journal = Journal(self.out / "samples.jsonl")
        known = {document.name for document in self.samples(prompts)}
        never = {str(eos): -100.0}  # a reply that ends early would be a document of another length

        def sample(name: str) -> None:
            sampling = {"temperature": 0.8, "max_new_tokens": self.experiment.tokens, "logit_bias": never}
            sampling |= {"ignore_eos": True, "custom_params": {"kv_evict": "none"}}
            body = {"input_ids": prompts[name], "rid": name, "sampling_params": sampling}
            reply = _read(server.post("/generate", body, timeout=3600))
            journal.add([{"name": name, "reply": reply["output_ids"]}])

        self._each(sample, [name for name in prompts if name not in known], "sampling", self.whole(prompts.values()))
        return self.samples(prompts)

    # -- forcing ------------------------------------------------------------------------------------------------------

    def result(self, arm: str, document: str) -> Path:
        """Return the file of an arm's steps on a document."""
        return self.out / arm / f"{document}.npy"

    def missing(self, arm: str, documents: Sequence[Document]) -> list[Document]:
        """Return the documents whose steps an arm lacks."""
        return [document for document in documents if not self.result(arm, document.name).exists()]

    def _force(self, server: Server, folder: str, documents: Sequence[Document]) -> None:
        from lethe_bench.fidelity.processor import Forced

        missing = self.missing(folder, documents)
        if not missing:
            return
        (self.out / folder).mkdir(exist_ok=True)
        arm, load = self.experiment.points().get(folder, Point(folder, None))
        self._switch(server, arm)
        processor = Forced.to_str()

        def force(document: Document) -> None:
            reference = None if arm == "full" else str(self.result("full", document.name).resolve())
            forced: dict[str, Any] = {"tokens": document.reply, "reference": reference}
            forced["result"] = str(self.result(folder, document.name).resolve())
            custom = {"forced": forced, **({"kv_evict": "none"} if arm == "full" else {})}
            sampling = {"temperature": 0, "max_new_tokens": len(document.reply), "ignore_eos": True}
            body = {
                "input_ids": document.prompt,
                "rid": f"{folder}-{document.name}",
                "custom_logit_processor": processor,
            }
            given = {"sampling_params": {**sampling, "custom_params": custom}}
            reply = _read(server.post("/generate", body | given, timeout=3600))
            if reply["output_ids"] != document.reply or not self.result(folder, document.name).exists():
                raise ServerError(f"the reply of {document.name} was not forced; see {server.log}")

        if load is None:
            prompts = [document.prompt for document in missing]
            self._each(force, missing, folder, self.whole(prompts) if arm == "full" else self.experiment.at_once)
            return
        journal = Journal(self.out / loads.JOURNAL)
        for number, group in enumerate(loads.groups(documents, load), 1):
            if self.missing(folder, group):  # it fills the pool as one, so all of it is forced again
                server.post("/flush_cache?timeout=60", {})
                offset = server.log.stat().st_size
                self._each(force, group, f"{folder}, group {number}", load)
                held = parse_log(read_from(server.log, offset))
                journal.add([{"arm": arm, "load": load, "group": number, **asdict(held)}])

    def _answer(self, server: Server, arm: str, prompts: dict[str, list[int]]) -> None:
        """Let an arm write replies of its own, and keep how far the full cache is from each."""
        missing = trajectory.missing(self.out, arm, prompts)
        if missing:
            self._switch(server, arm)

        def answer(name: str) -> None:
            path = trajectory.path_of(self.out, arm, name)
            trajectory.keep(server, path, prompts[name], self.experiment.tokens, evicts=arm != "full")

        self._each(answer, missing, f"{arm}, own trajectories", self.experiment.at_once)

    def _switch(self, server: Server, arm: str) -> None:
        if arm != "full":
            switch(server, Arm(arm, 0, self.experiment.arms[arm], self.experiment.configs()[arm]))

    def _each(self, work: Callable[[Any], None], items: Sequence[Any], what: str, at_once: int) -> None:
        with ThreadPoolExecutor(at_once) as pool:
            for _ in tqdm(pool.map(work, items), total=len(items), desc=what, file=sys.stderr, disable=not items):
                pass


def _read(answer: str) -> dict[str, Any]:
    reply = json.loads(answer)
    if "error" in reply:
        raise ServerError(str(reply["error"]))
    return dict(reply)
