"""Write dialogues about children's stories, for a small model to be fine-tuned on.

    python experiments/benchmarks/story_dialogues.py --stories tinystories/train.jsonl --output dialogues/train.jsonl
    python experiments/benchmarks/story_dialogues.py --stories tinystories/valid.jsonl --output dialogues/valid.jsonl
    diffusionlm data prepare dialogues/train.jsonl --validation dialogues/valid.jsonl --format sft --pack \
        --tokenizer docs/results/models/tinystories --sequence_length 256 --output data/chat
    diffusionlm train tinystories_chat --data.path data/chat --run.init_from docs/results/models/tinystories

The dialogues are made of the stories by rules. In some a user asks for a story about somebody or something, and how it
goes on. In others a user tells the begin of a story and asks a question, whose answer is a sentence of it. Others are
greetings and questions such as "What is a cat?" with answers that are written below, which a model can only learn by
heart. Equal arguments give equal dialogues.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import tyro

Turns = list[tuple[str, str]]  # questions with their answers

GREETINGS = (
    (("Hello", "Hi", "Hey", "Good morning", "Good day"), "Hello! What story would you like to hear?"),
    (("How are you?", "Are you well?", "How do you feel?"), "I am happy. Shall I tell you a story?"),
    (("Who are you?", "What are you?", "What is your name?"), "I am a small model. I tell stories."),
    (("What can you do?", "Can you help me?"), "I can tell you a story, and answer a question about it."),
    (("Thank you", "Thanks", "That was nice", "I like it"), "You are welcome!"),
    (("Bye", "Good night", "See you", "Goodbye"), "Goodbye! Sleep well."),
)
THINGS = {
    "cat": "an animal that says meow. It likes milk and fish",
    "dog": "an animal that says woof. It likes to run and play with a ball",
    "bird": "an animal with wings. It can fly and sing",
    "fish": "an animal that lives in water. It can swim",
    "frog": "a green animal that can jump",
    "bear": "a big animal with brown fur. It likes honey",
    "bee": "a small animal that makes honey",
    "bunny": "a small animal with long ears. It likes carrots",
    "lion": "a big cat that can roar",
    "mouse": "a very small animal. It likes cheese",
    "cow": "a big animal that gives milk",
    "duck": "a bird that can swim. It says quack",
    "tree": "a big plant with leaves",
    "flower": "a plant that is pretty and smells nice",
    "ball": "a round toy. You can throw it and catch it",
    "doll": "a toy that looks like a small person",
    "book": "a thing with pages and words. You can read it",
    "car": "a thing with wheels. It can go fast",
    "boat": "a thing that goes on water",
    "train": "a long thing that goes on rails",
    "bed": "a thing to sleep in",
    "hat": "a thing to wear on your head",
    "cake": "a sweet food. We eat it on a birthday",
    "apple": "a fruit. It is red or green and it is sweet",
    "park": "a place with trees where children play",
    "kitchen": "a room where we cook food",
    "friend": "a person who likes you and plays with you",
    "doctor": "a person who helps you when you are sick",
    "farm": "a place with animals like cows and pigs",
    "rainbow": "many colors in the sky after the rain",
    "moon": "a light in the sky at night",
    "sun": "a big light in the sky. It is warm",
    "snow": "cold and white. It falls from the sky",
}
# A sentence of a story, with the question that it answers.
QUESTIONS = (
    (r"{name} went to the (?:park|store|beach|forest|zoo|garden|farm|kitchen|school|lake)\b.*", "Where did {name} go?"),
    (r"{name} (?:saw|found) (?:a|an|some|the) .*", "What did {name} see?"),
    (r"{name} (?:wanted|liked|loved) to .*", "What did {name} want to do?"),
    (r"{name} (?:was|felt) (?:very |so )?(?:happy|sad|scared|angry|excited|tired|proud)\b.*", "How did {name} feel?"),
)
ASKED = ("Tell me a story about {}.", "Can you tell me a story about {}?", "I want a story about {}.")
NEXT = ("What happened next?", "And then?", "Go on.")
END = ("How does it end?", "What happens in the end?")
SENTENCE = re.compile(r'[^.!?]+[.!?]+"?\s*')
NAME = re.compile(r"\b(?:named|called|name was) ([A-Z][a-z]+)")


def sentences(story: str) -> list[str]:
    """Return the sentences of a story; those within one quotation are together, with who said it."""
    found: list[str] = []
    for sentence in SENTENCE.findall(" ".join(story.split())):
        if found and (found[-1].count('"') % 2 or sentence.strip()[0].islower()):
            found[-1] += " " + sentence.strip()
        else:
            found.append(sentence.strip())
    return found


def about(story: str, rng: random.Random) -> str | None:
    """Return who or what the begin of a story is about: a name that is given in it, or one of `THINGS`."""
    subjects = [
        f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in THINGS if re.search(rf"\b{thing}\b", story)
    ]
    name = NAME.search(story)
    subjects = rng.sample(subjects, min(2, len(subjects)))
    if name and (not subjects or rng.random() < 0.5):
        return name[1]
    return " and ".join(subjects[: rng.randint(1, 2)]) or None


def told(story: str, rng: random.Random) -> Turns | None:
    """Return a dialogue in which a story is told in two or three parts; None if nobody could ask for it."""
    parts = sentences(story)
    first, second = rng.randint(2, 3), rng.randint(2, 3)
    subject = about(" ".join(parts[:first]), rng)
    if subject is None or len(parts) < first + second + 2:
        return None
    turns = [(rng.choice(ASKED).format(subject), " ".join(parts[:first]))]
    turns.append((rng.choice(NEXT), " ".join(parts[first : first + second])))
    turns.append((rng.choice(END), " ".join(parts[-2:])))
    return turns


def asked(story: str, rng: random.Random) -> Turns | None:
    """Return the begin of a story with a question that a sentence of it answers; None if no rule finds one."""
    parts, name = sentences(story)[:7], NAME.search(story)
    if not name or len(parts) < 4:
        return None
    name = name[1]
    known = [
        (question.format(name=name), sentence)
        for pattern, question in QUESTIONS
        for sentence in parts
        if re.fullmatch(pattern.format(name=name), sentence)
    ]
    if not known or rng.random() < 0.3:
        known = [("Who is the story about?", f"The story is about {name}.")]
    question, answer = rng.choice(known)
    last = max((i for i, sentence in enumerate(parts) if sentence == answer), default=2)
    return [(" ".join(parts[: max(last + 1, 3)]) + " " + question, answer)]


def learned_by_heart(rng: random.Random) -> Turns:
    """Return a greeting, or a question about one of `THINGS`."""
    if rng.random() < 0.4:
        questions, answer = rng.choice(GREETINGS)
        question = rng.choice(questions)
        end = "" if question[-1] == "?" else rng.choice(("", "!", "."))
        return [(question + end, answer)]
    thing, answer = rng.choice(sorted(THINGS.items()))
    article = (
        "" if answer.startswith("cold") else "the " if thing in ("sun", "moon") else "an " if thing == "apple" else "a "
    )
    question = rng.choice(("What is {}?", "Tell me what {} is.", "Do you know what {} is?")).format(article + thing)
    return [(question, f"{(article + thing).capitalize()} is {answer}.")]


def dialogues(stories: list[str], seed: int) -> Iterator[Turns]:
    """Yield the dialogues: of each story one that tells it and one with a question, and some to be learned by heart."""
    rng = random.Random(seed)
    for story in stories:
        yield from (turns for turns in (told(story, rng), asked(story, rng)) if turns)
        if rng.random() < 0.25:
            yield learned_by_heart(rng)


def main(stories: Path, output: Path, seed: int = 0) -> None:
    """Write the dialogues.

    Args:
      stories: a .jsonl file whose lines have a story as "text", such as TinyStories'.
      output: the .jsonl file to write.
      seed: of the choices.
    """
    texts = [json.loads(line)["text"] for line in stories.read_text(encoding="utf-8").splitlines()]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as file:
        for turns in dialogues(texts, seed):
            messages = [
                {"role": role, "content": content}
                for turn in turns
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
