"""Files of a few records for the tasks of lm-evaluation-harness, in the layout of their directory."""

import json
from pathlib import Path

HELLASWAG = [
    {"query": f"Number {i}: a", "choices": [f"b{i}", "cd", "a longer end", "zz top"], "gold": i % 4} for i in range(6)
]
PIQA = [{"goal": f"goal {i}", "sol1": "do it", "sol2": "leave that alone"} for i in range(5)]
WINOGRANDE = [{"context_options": ["Al saw Bo, so Al", "Al saw Bo, so Bo"], "continuation": "ran.", "gold": 1}] * 2
LAMBADA = [{"context": f"It is {i} o", "continuation": "clock"} for i in range(3)]
GSM8K = [{"question": f"{i}+1?", "answer": f"So\n#### {i + 1}"} for i in range(4)]
BOOLQ = [{"query": f"Passage: It is {i}.\nQuestion: is it?", "choices": ["no", "yes"], "gold": i % 2} for i in range(3)]

HUMANEVAL = [
    {
        "task_id": f"T/{i}",
        "prompt": f"def plus_{i}(a):\n",
        "entry_point": f"plus_{i}",
        "test": f"def check(f):\n    assert f(1) == {i + 1}\n",
        "canonical_solution": f"    return a + {i}\n",
    }
    for i in range(3)
]
MBPP = [  # the examples of the prompt are those of 2 to 4, the test set 11 to 510
    {
        "text": f"Write a function to add {i}.",
        "code": f"import math\r\ndef plus(a):\r\n  return a + {i}",
        "task_id": i,
        "test_setup_code": "",
        "test_list": [f"assert plus({a}) == {a + i}" for a in range(3)],
        "challenge_test_list": [],
    }
    for i in (1, 2, 3, 4, 5, 10, 11, 510, 511)
]


def write(directory: Path) -> str:
    """Write the files; returns the directory."""
    files = {
        "eval/hellaswag/hellaswag_val.jsonl": HELLASWAG,
        "eval/piqa/valid.jsonl": PIQA,
        "eval/llm-foundry/winogrande.jsonl": WINOGRANDE,
        "eval/llm-foundry/boolq.jsonl": BOOLQ,
        "eval/lambada/lambada_openai.jsonl": LAMBADA,
        "HumanEval.jsonl": HUMANEVAL,
        "eval/mbpp/mbpp.jsonl": MBPP,
        "gsm8k/train.jsonl": GSM8K,
        "gsm8k/test.jsonl": GSM8K,
    }
    for name, records in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "eval/piqa/valid-labels.lst").write_text("".join(f"{i % 2}\n" for i in range(len(PIQA))))
    return str(directory)
