"""Write the problems of GSM8K as examples for fine-tuning, in the forms of two papers.

    python experiments/benchmarks/gsm8k_examples.py --problems gsm8k/train.jsonl --output data/gsm8k.jsonl --form smdm
    diffusionlm data prepare data/gsm8k.jsonl --format sft --template none --sequence_length 256 ...

A problem has a "question" and an "answer", whose last line is `#### N`. With --form smdm it gives two examples, as in
SMDM (arXiv 2410.18514): the question with the solution, and both of them with the number; SMDM also ends questions and
solutions with a token. With --form diffugpt it gives the question with the equations of its solution alone, as in
DiffuGPT (arXiv 2410.17891): `<<48/2=24>> <<48+24=72>> #### 72`. Both papers used more problems, which they made from
GSM8K's with other models; the recipes `smdm_gsm8k` and `diffugpt_gsm8k` have the number of steps for those.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro


def smdm(question: str, answer: str) -> Iterator[dict[str, str]]:
    """Yield the two examples of a problem: its solution, and its number given the solution."""
    solution, _, number = answer.rpartition("####")
    prompt, solution = f"Question: {question}\nAnswer:", f" {solution.strip()}"
    yield {"prompt": prompt, "completion": solution}
    yield {"prompt": f"{prompt}{solution}\n", "completion": f"#### {number.strip()}"}


def diffugpt(question: str, answer: str) -> Iterator[dict[str, str]]:
    """Yield a problem with the equations of its solution; one without equations has only the number."""
    _, _, number = answer.rpartition("####")
    equations = re.findall("<<.*?>>", answer)
    yield {"prompt": f"Question: {question}\nAnswer:", "completion": " ".join(["", *equations, "####", number.strip()])}


FORMS = {"smdm": smdm, "diffugpt": diffugpt}


def main(problems: Path, output: Path, form: Literal["smdm", "diffugpt"]) -> None:
    """Write the examples of a file of problems.

    Args:
      problems: a .jsonl file whose lines have "question" and "answer", such as GSM8K's train.jsonl.
      output: the .jsonl file to write.
      form: whose examples.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with problems.open(encoding="utf-8") as lines, output.open("w", encoding="utf-8") as file:
        for line in lines:
            problem = json.loads(line)
            for example in FORMS[form](problem["question"], problem["answer"]):
                file.write(json.dumps(example) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
