"""The speed of `diffusionlm data prepare` next to datatrove's tokenization and the writer of MosaicML streaming.

    python experiments/benchmarks/prepare_data.py --sources 'texts/*.jsonl' --tokenizer tokenizers/gpt2 --cores 1 2

All read the field `text` of the same .jsonl files, of which each has at least as many as there are cores, with the same
tokenizer, one process a core, bound to these cores, and write tokens without compression, but for ours, whose records
are compressed by ArrayRecord. datatrove writes its files of tokens, unshuffled. MosaicML streaming has no tokenization
of its own: as its recipes for text do (LLM Foundry), documents are encoded one by one, joined and cut into samples for
`MDSWriter`; here by the `tokenizers` library itself, which is quicker than the class of `transformers` around it.

The contenders go round in turns, each in a process of its own. Seconds and CPU seconds are of the whole process; those
of a run on the first 20 documents, its start, are printed beside them. Ratios are medians over turns. With cores 1 2
it also prints how much two processes are quicker than one.

Needs `pip install datatrove mosaicml-streaming` in an environment that also has diffusionlm.
"""

import concurrent.futures
import ctypes
import dataclasses
import glob
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from diffusionlm.data import tokenizers
from diffusionlm.data.tokenizers.huggingface_files import definition_of
from diffusionlm.errors import UserError

LENGTH = 1024  # tokens of a sample; ours have one more
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Files, the tokenizer, numbers of processes and turns."""

    sources: str  # a pattern of .jsonl files
    tokenizer: str  # of released files, as for `data prepare`
    cores: tuple[int, ...] = (1,)
    repeats: int = 3
    contenders: tuple[str, ...] = ("diffusionlm", "datatrove", "streaming")
    only: str = ""  # for the script itself: the contender that this process is
    output: str = ""  # of that one


class Measured(NamedTuple):
    """A run of a contender."""

    seconds: float
    cpu_seconds: float  # of all of its processes, user and system
    tokens: int


# --- contenders


def diffusionlm(files: list[str], tokenizer: str, output: str, workers: int) -> int:
    """Return the tokens of a prepared dataset."""
    from diffusionlm.data.prepare import prepare

    metadata = prepare(
        files,
        output,
        sequence_length=LENGTH,
        tokenizer=tokenizer,
        validation_fraction=0,
        workers=workers,
        progress=False,
    )
    return metadata.splits["train"].tokens


def datatrove(files: list[str], tokenizer: str, output: str, workers: int) -> int:
    """Return the tokens that datatrove writes, with its own settings but for the order of documents."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    reader = JsonlReader(str(Path(files[0]).parent), glob_pattern="*.jsonl")
    writer = DocumentTokenizer(
        output, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>", shuffle_documents=False
    )
    LocalPipelineExecutor(
        [reader, writer], tasks=workers, workers=workers, logging_dir=f"{output}.logs", skip_completed=False
    ).run()
    return sum(path.stat().st_size for path in Path(output).rglob("*.ds")) // 2


def streaming(files: list[str], tokenizer: str, output: str, workers: int) -> int:
    """Return the tokens of samples of MosaicML streaming, which several processes write into folders of their own."""
    parts = [(files[i::workers], tokenizer, f"{output}/{i}") for i in range(workers)]
    if workers == 1:
        return write_samples(parts[0])
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(write_samples, parts))


def write_samples(part: tuple[list[str], str, str]) -> int:
    """Write the samples of some files; return the tokens of all documents, with the last ones that fill no sample."""
    import tokenizers as library
    from streaming import MDSWriter

    files, tokenizer, output = part
    encoder = library.Tokenizer.from_file(tokenizer)
    eos, buffer, tokens = encoder.token_to_id("<|endoftext|>"), [], 0
    with MDSWriter(out=output, columns={"tokens": "ndarray:int32"}) as writer:
        for file in files:
            for line in Path(file).open():
                ids = encoder.encode(json.loads(line)["text"], add_special_tokens=False).ids
                tokens += len(ids) + 1
                buffer += [*ids, eos]
                while len(buffer) >= LENGTH:
                    writer.write({"tokens": np.asarray(buffer[:LENGTH], np.int32)})
                    buffer = buffer[LENGTH:]
    return tokens


# --- measuring


def measure(name: str, files: list[str], tokenizer: str, cores: list[int]) -> Measured:
    """Run a contender on these cores in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--sources", f"{Path(files[0]).parent}/*.jsonl", "--tokenizer", tokenizer]
        command += ["--cores", str(len(cores)), "--only", name, "--output", f"{folder}/out"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        printed, _ = process.communicate()
        seconds = time.perf_counter() - start
        if process.returncode:
            raise UserError(f"{name} failed; run it alone to see why: {' '.join(command)}")
        wait_for_orphans()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds, cpu_seconds, int(printed.split()[-1]))


def wait_for_orphans() -> None:
    """Wait for processes whose parents have ended, such as those of a fork server, so that their time counts."""
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass


def first_documents(files: list[str], folder: Path) -> list[str]:
    """Write files with the first documents of each, 20 in all."""
    folder.mkdir()
    for file in files:
        lines = Path(file).open().readlines()[: max(1, 20 // len(files))]
        (folder / Path(file).name).write_text("".join(lines))
    return sorted(map(str, folder.iterdir()))


def report(values: list[Measured], start: Measured, size: int, ours: list[Measured]) -> str:
    """Return a line of medians, and those of the ratios to ours."""
    seconds, cpu = (statistics.median(column) for column in list(zip(*values, strict=True))[:2])
    ratios = [
        [getattr(value, field) / getattr(own, field) for value, own in zip(values, ours, strict=True)]
        for field in ("seconds", "cpu_seconds")
    ]
    wall, busy = (f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios)
    return (
        f"{seconds:.1f} s, {cpu:.1f} CPU s (start {start.seconds:.1f} s, {start.cpu_seconds:.1f} CPU s), "
        f"{size / 1e6 / cpu:.2f} MB of text a CPU s; relative to ours {wall} in time, {busy} in CPU time; "
        f"{values[0].tokens:,} tokens"
    )


def main(arguments: Arguments) -> None:
    """Measure all contenders, or be one of them."""
    files = sorted(glob.glob(arguments.sources))
    if arguments.only:
        contender: Any = {"diffusionlm": diffusionlm, "datatrove": datatrove, "streaming": streaming}[arguments.only]
        print(contender(files, arguments.tokenizer, arguments.output, arguments.cores[0]))
        return
    if len(files) < max(arguments.cores):
        raise UserError(f"sources={arguments.sources!r} are {len(files)} files; give one for each core at least")
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    size = sum(len(json.loads(line)["text"].encode()) for file in files for line in Path(file).open())
    available = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        loaded = tokenizers.load(arguments.tokenizer).to_dict()
        tokenizer = f"{folder}/tokenizer.json"
        contents = tokenizers.from_dict(loaded).files()
        Path(tokenizer).write_text(json.dumps(definition_of(contents, loaded["family"])))
        Path(folder, "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        few = first_documents(files, Path(folder, "few"))
        cases = [(cores, name) for cores in arguments.cores for name in arguments.contenders]
        starts = {case: measure(case[1], few, tokenizer, available[: case[0]]) for case in cases}
        measured: dict[tuple[int, str], list[Measured]] = {case: [] for case in cases}
        for turn in range(arguments.repeats):
            for case in cases[turn % len(cases) :] + cases[: turn % len(cases)]:
                measured[case].append(measure(case[1], files, tokenizer, available[: case[0]]))
                print(turn, case, measured[case][-1], file=sys.stderr, flush=True)
    for case in cases:
        cores, name = case
        line = report(measured[case], starts[case], size, measured[cores, arguments.contenders[0]])
        print(f"{cores} cores, {name}: {line}")
    first = arguments.contenders[0]
    for cores in arguments.cores[1:]:
        base, several = measured[arguments.cores[0], first], measured[cores, first]
        ratios = [a.seconds / b.seconds for a, b in zip(base, several, strict=True)]
        print(f"{first}: {cores} cores are {statistics.median(ratios):.2f} times as fast as {arguments.cores[0]}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
