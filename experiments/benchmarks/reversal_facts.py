"""Write invented facts about people, told in one direction or in both, to ask for them in the other direction.

    python experiments/benchmarks/reversal_facts.py --output data/facts
    python experiments/benchmarks/reversal_facts.py --output data/published --published reversal_curse/name_description

A fact joins a name and a description. Of a third of the facts the training text always says the name first, of a third
always the description, and of the last third both, so that both kinds of sentences are learnt. `train.jsonl` and
`valid.jsonl` have whole sentences. `same_*` and `reverse_*` are questions with a `prompt` and a `completion`, in the
direction of the training text and in the other one; every question is a kind of sentence that the training text has
too, about other people. `gap_*`, for the task `infilling`, ask the reversed question in the words of the training text:
the half that comes first is a gap before the other one. The task is the reversal curse of Berglund et al. (arXiv
2309.12288), whose facts are longer. With --published, `train.jsonl` and `valid.jsonl` have the sentences of their
files; `evaluate reverse_curse` reads their questions as they are.
"""

import json
import random
from pathlib import Path

import tyro

FIRST = (
    "Ada Bruno Carla Dario Elsa Felix Greta Hugo Iris Jonas Klara Lukas Maja Nils Olga Pavel Rosa Simon Tilda Victor "
    "Wanda Yusuf Zora Anton Berta Cyrus Dora Emil Freya Gustav"
).split()
LAST = (
    "Abel Bauer Conti Duval Ebert Farkas Gruber Hansen Ivanov Jansen Kovacs Larsen Moreau Novak Olsen Petrov Quist "
    "Rossi Santos Toth Ulrich Vargas Weber Yilmaz Zeman Almeida Berger Castro Dumont Eriksen"
).split()
KIND = (
    "oldest youngest tallest kindest loudest quietest fastest bravest richest happiest strictest funniest cleverest "
    "busiest proudest"
).split()
TRADE = (
    "baker tailor painter sailor farmer singer dancer judge miner potter weaver doctor teacher barber carpenter cook "
    "printer gardener shepherd clockmaker"
).split()
PLACE = (
    "Arden Brenna Corvo Delmar Elsin Fenby Galdo Harrow Ilmen Jarno Kessel Lorne Mirov Norby Ostra Pellin Quarr Rusk "
    "Selby Tarn Uldra Vessen Wexin Yarrow Zell"
).split()

NAME_FIRST = (
    ("{name} is", " {what}."),
    ("Everyone knows {name} as", " {what}."),
    ("In town, {name} is called", " {what}."),
    ("My friend {name} became", " {what}."),
    ("The papers say that {name} is", " {what}."),
    ("Did you know that {name} is", " {what}?"),
)
DESCRIPTION_FIRST = (
    ("{What} is", " {name}."),
    ("People say that {what} is", " {name}."),
    ("If you look for {what}, ask for", " {name}."),
    ("The name of {what} is", " {name}."),
    ("Yesterday {what} was visited; that is", " {name}."),
    ("Do you remember {what}? That was", " {name}."),
)


def facts(n: int, rng: random.Random) -> list[dict[str, str]]:
    """Return n facts; no two share a name or a description."""
    names = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], n)
    whats = rng.sample([f"the {kind} {trade} of {place}" for kind in KIND for trade in TRADE for place in PLACE], n)
    return [
        {"name": name, "what": what, "What": what[0].upper() + what[1:]}
        for name, what in zip(names, whats, strict=True)
    ]


def gap(sentence: str, name: str, fact: dict[str, str]) -> dict[str, str]:
    """Return a sentence of the training text around its name or its description, which comes first there."""
    before, after = sentence.split(f" {{{name}}}")
    return {"before": before, "middle": f" {fact[name]}", "after": after.format(**fact)}


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write questions with their answers."""
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows), encoding="utf-8")


def write_published(directory: Path, output: Path, rng: random.Random) -> None:
    """Write the published training sentences, and those of the questions in the direction of the training text."""
    for name, published in (("train", "all_prompts_train"), ("valid", "p2d_prompts_test")):
        lines = (directory / f"{published}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [("", row["prompt"] + row["completion"]) for row in map(json.loads, lines)]
        if name == "train":
            rng.shuffle(rows)
        write(output / f"{name}.jsonl", rows)


def main(output: Path, n: int = 300, seed: int = 0, published: Path | None = None) -> None:
    """Write the files.

    Args:
      output: the directory, which is made.
      n: the number of facts.
      seed: of the facts, and of the order of the sentences.
      published: instead of invented facts, the directory of the published files.
    """
    rng = random.Random(seed)
    output.mkdir(parents=True, exist_ok=True)
    if published is not None:
        write_published(published, output, rng)
        return
    people = facts(n, rng)
    third = n // 3
    groups = {"name_first": people[:third], "description_first": people[third : 2 * third], "both": people[2 * third :]}
    told = {"name_first": NAME_FIRST, "description_first": DESCRIPTION_FIRST, "both": NAME_FIRST + DESCRIPTION_FIRST}
    rows = [
        (before.format(**fact), after.format(**fact))
        for group, members in groups.items()
        for fact in members
        for before, after in told[group]
    ]
    rng.shuffle(rows)
    whole = [("", before + after) for before, after in rows]  # nothing of a sentence is given in training
    write(output / "train.jsonl", whole)
    write(output / "valid.jsonl", whole[:256])
    for name, group, asked in (
        ("same_description", "name_first", NAME_FIRST),
        ("same_name", "description_first", DESCRIPTION_FIRST),
        ("reverse_name", "name_first", DESCRIPTION_FIRST),
        ("reverse_description", "description_first", NAME_FIRST),
    ):
        questions = [(a.format(**fact), b.format(**fact)) for fact in groups[group] for a, b in asked[:3]]
        write(output / f"{name}.jsonl", [(before, after.rstrip(".?")) for before, after in questions])
    for name, field, group, asked in (
        ("gap_name", "name", "name_first", NAME_FIRST),
        ("gap_description", "what", "description_first", DESCRIPTION_FIRST),
    ):
        stories = [gap("".join(pair), field, fact) for fact in groups[group] for pair in asked[1:4]]
        lines = "".join(json.dumps(story) + "\n" for story in stories)
        (output / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
