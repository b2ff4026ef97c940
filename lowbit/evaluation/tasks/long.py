"""Long context: tasks that are generated, at any length in tokens of the model's own tokenizer, and two sets of data.

All are judged as cloze: the answer's tokens must be the greedy ones behind the prompt, and their likelihood is kept.
Items of one seed share what was drawn for it over all lengths and depths, so the seed is their cluster.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lowbit.errors import EvidenceError
from lowbit.evaluation.tasks import answers, schemas
from lowbit.evaluation.tasks.base import Option, Question, Record, Task, Value
from lowbit.evaluation.tasks.measures import ACCURACY, PARSED, RUNAWAY, TARGET_NLL

LENGTHS = (256, 512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = 10
_SPARE = 8  # tokens that a prompt may stay below its length

Build = Callable[[random.Random, int, float], tuple[str, str]]
"""From a seeded generator, a number of units (lines, pairs, sentences) and a depth: the context and the target."""

_ADJECTIVES = [
    "amber", "brisk", "calm", "dusty", "eager", "faint", "grand", "humble", "icy", "jolly", "keen", "lucid", "mellow",
    "noble", "olive", "proud", "quiet", "rusty", "silent",
]  # fmt: skip
_NOUNS = [
    "anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jacket", "kettle",
    "ladder", "meadow", "needle", "orchard", "pocket",
]  # fmt: skip
_NOISE = (
    "The road bends twice before it reaches the mill.", "Rain fell on the roof for most of the afternoon.",
    "A cart went by and nobody looked up.", "The baker closed his shutters early that day.",
    "Somewhere a dog barked and then was still.", "The letters lay unopened on the table.",
    "Two boats were tied up below the bridge.", "The clock in the hall was a little slow.",
)  # fmt: skip
_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dakar", "Quito", "Riga", "Hanoi", "Tunis")


def lines(rng: random.Random, units: int, depth: float) -> tuple[str, str]:
    """LongEval's register of named lines; one of them is begun again, and its number is to follow."""
    names = _names(rng, max(units, 2))
    numbers = [rng.randrange(10_000, 100_000) for _ in names]
    record = [f"line {name}: REGISTER_CONTENT is <{n}>" for name, n in zip(names, numbers, strict=True)]
    again, _, number = record[_place(depth, len(names))].rpartition(" ")
    return "\n".join(["Remember these lines.\n", *record, f"\nAs the record above says, {again}"]), f" {number}"


def pairs(rng: random.Random, units: int, depth: float) -> tuple[str, str]:
    """A JSON object of random keys and values; the value of one key is asked."""
    records = [(f"{rng.getrandbits(32):08x}", f"{rng.getrandbits(32):08x}") for _ in range(max(units, 2))]
    return _pairs(records, records[_place(depth, len(records))][0])


def needle(rng: random.Random, units: int, depth: float) -> tuple[str, str]:
    """One sentence with a number among sentences that say nothing about it."""
    city, number = rng.choice(_CITIES), str(rng.randrange(1_000_000, 10_000_000))
    sentences = [rng.choice(_NOISE) for _ in range(max(units, 1))]
    sentences.insert(round(depth * len(sentences)), f"The special number of {city} is {number}.")
    return f"{' '.join(sentences)}\n\nAs the text says, the special number of {city} is", f" {number}"


def make(build: Build) -> Callable[[Any, Sequence[int]], Iterator[Record]]:
    """The generator of a task: a record for each seed, length and depth.

    They are mixed, so that the first few hold many lengths, depths and seeds.
    """

    def records(tokenizer: Any, lengths: Sequence[int]) -> Iterator[Record]:
        places = [(length, depth) for depth in DEPTHS for length in lengths]
        for turn in range(SEEDS):
            for i, (length, depth) in enumerate(places):
                seed = (turn + i) % SEEDS
                context, target = fitted(build, tokenizer, length, seed, depth)
                name = f"{length}/{depth:g}"
                value = {"id": f"{build.__name__}/{name}/{seed}", "context": context, "target": target.strip(),
                         "group": name, "seed": seed}  # fmt: skip
                yield Record(value, f"{build.__name__}, seed {seed}")

    return records


def fitted(build: Build, tokenizer: Any, length: int, seed: int, depth: float) -> tuple[str, str]:
    """Context and target of at most ``length`` tokens, and as near to it as whole units allow.

    Raises EvidenceError when not even two units fit.
    """

    def size(units: int) -> int:
        return len(tokenizer.encode("".join(build(random.Random(seed), units, depth))))

    low, high = 2, max(length // 4, 4)
    if size(low) > length:
        raise EvidenceError(f"{length} tokens are too few for {build.__name__}", fix=f"--lengths {size(low)} or more")
    while low < high:  # the largest that fits
        middle = (low + high + 1) // 2
        used = size(middle)
        if used > length:
            high = middle - 1
        else:
            low = middle
            if used >= length - _SPARE:
                break
    return build(random.Random(seed), low, depth)


def ask_made(value: Value, shots: Sequence[Value]) -> Question:
    """The target behind the generated context."""
    option = Option(value["context"], f" {value['target']}", True)
    return Question(value["id"], str(value["seed"]), value["group"], (option,))


def ask_kv(value: Value, shots: Sequence[Value]) -> Question:
    """The value of one key of the record's own pairs."""
    context, target = _pairs([(k, v) for k, v in value["records"]], value["key"])
    return Question(value["id"], value["id"], f"{len(value['records'])} pairs", (Option(context, target, True),))


def ask_prompt(value: Value, shots: Sequence[Value]) -> Question:
    """The prompt as it is."""
    return Question(value["id"], value["id"], prompt=value["prompt"])


def _pairs(records: Sequence[tuple[str, str]], key: str) -> tuple[str, str]:
    body = ",\n".join(f'"{k}": "{v}"' for k, v in records)
    return f'JSON data:\n{{{body}}}\n\nThe value of the key "{key}" is', f' "{dict(records)[key]}"'


def _names(rng: random.Random, units: int) -> list[str]:
    """The first ones are the same for any number of units."""
    found: list[str] = []
    while len(found) < units:
        rounds = f"-{len(found)}" if found else ""
        more = [f"{a}-{n}{rounds}" for a in _ADJECTIVES for n in _NOUNS]
        rng.shuffle(more)
        found += more
    return found[:units]


def _place(depth: float, units: int) -> int:
    return min(round(depth * (units - 1)), units - 1)


_MEASURES = (ACCURACY, TARGET_NLL)
_WRITTEN = (ACCURACY, PARSED, RUNAWAY)


def _made(name: str, build: Build, about: str) -> Task:
    return Task(name, "long", "", schemas.CLOZE, "cloze", ask_made, _MEASURES, about=about, make=make(build))


TASKS = (
    _made("lines", lines, "the number of one named line"),
    _made("pairs", pairs, "the value of one key"),
    _made("needle", needle, "one sentence among others, by depth and length"),
    Task("kv_retrieval", "long", "long/kv_retrieval_75.jsonl", schemas.KV, "cloze", ask_kv, _MEASURES,
         about="the value of one key among 75"),
    Task("longeval_lines", "long", "long/longeval_lines.jsonl", schemas.GENERATION, "generation", ask_prompt, _WRITTEN,
         answers.contains, ("\n",), 32, about="200 to 600 lines"),
    Task("longeval_topics", "long", "long/longeval_topics.jsonl", schemas.GENERATION, "generation", ask_prompt,
         _WRITTEN, answers.contains, (), 32, about="the first of 5 to 20 topics"),
)  # fmt: skip
