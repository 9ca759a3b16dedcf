"""The data of the published runs: which corpora, in which shares, and how to prepare them from the published files.

Clone `cerebras/SlimPajama-627B`, `bigcode/starcoderdata` or `HuggingFaceFW/fineweb` from the Hugging Face Hub first.
"""

from diffusionlm.registry import PublishedData


def slimpajama(name: str, tokenizer: str, choice: str = "") -> str:
    """Return the command that prepares SlimPajama, 627B tokens of LLaMA's vocabulary, as data/NAME."""
    files = f"'SlimPajama-627B/train/*/*.jsonl.zst' --validation 'SlimPajama-627B/validation/*/*.jsonl.zst'{choice}"
    return f"diffusionlm data prepare {files} --tokenizer {tokenizer} --sequence_length 2048 --output data/{name}"


def starcoder(tokenizer: str) -> str:
    """Return the command that prepares the code that StarCoder was trained on."""
    files = "'starcoderdata/*/*.parquet' --text_field content"
    return f"diffusionlm data prepare {files} --tokenizer {tokenizer} --sequence_length 2048 --output data/starcoder"


def fineweb(name: str, tokenizer: str, length: int) -> str:
    """Return the command that prepares FineWeb's sample of 100B tokens, of which DiffuGPT took 30B, as data/NAME."""
    files = "'fineweb/sample/100BT/*.parquet'"
    return f"diffusionlm data prepare {files} --tokenizer {tokenizer} --sequence_length {length} --output data/{name}"


# The released code leaves out the documents from GitHub.
NO_GITHUB = " --where 'meta.redpajama_set_name!=RedPajamaGithub'"
SMDM = PublishedData(
    "slimpajama_no_github=1", (slimpajama("slimpajama_no_github", "llama2/tokenizer.model", NO_GITHUB),)
)
# The shares of the released code; the paper rounds them to 70% and 30%. They are by rows, and so by tokens.
DIFFULLAMA = PublishedData(
    "slimpajama=0.693584,starcoder=0.306416",
    (slimpajama("slimpajama", "runs/llama2_7b"), starcoder("runs/llama2_7b")),
    start="runs/llama2_7b",
)
DIFFUGPT_SMALL = PublishedData("fineweb_512=1", (fineweb("fineweb_512", "runs/gpt2", 512),), start="runs/gpt2")
DIFFUGPT_MEDIUM = PublishedData(
    "fineweb_1024=1", (fineweb("fineweb_1024", "runs/gpt2_medium", 1024),), start="runs/gpt2_medium"
)
