"""The data of the published runs: which corpora, in which shares, and how to prepare them from the published files.

Clone `cerebras/SlimPajama-627B`, `bigcode/starcoderdata` or `HuggingFaceFW/fineweb` from the Hugging Face Hub first.
"""

from diffusionlm.registry import PublishedData


def slimpajama(tokenizer: str, choice: str = "") -> str:
    """Return the command that prepares SlimPajama, 627B tokens of LLaMA's vocabulary."""
    files = f"'SlimPajama-627B/train/*/*.jsonl.zst' --validation 'SlimPajama-627B/validation/*/*.jsonl.zst'{choice}"
    return f"diffusionlm data prepare {files} --tokenizer {tokenizer} --sequence_length 2048 --output data/slimpajama"


def starcoder(tokenizer: str) -> str:
    """Return the command that prepares the code that StarCoder was trained on."""
    files = "'starcoderdata/*/*.parquet' --text_field content"
    return f"diffusionlm data prepare {files} --tokenizer {tokenizer} --sequence_length 2048 --output data/starcoder"


def fineweb(tokenizer: str, length: int) -> str:
    """Return the command that prepares FineWeb's sample of 100B tokens, of which DiffuGPT took 30B."""
    files = "'fineweb/sample/100BT/*.parquet'"
    return f"diffusionlm data prepare {files} --tokenizer {tokenizer} --sequence_length {length} --output data/fineweb"


# The released code leaves out the documents from GitHub.
NO_GITHUB = " --where 'meta.redpajama_set_name!=RedPajamaGithub'"
SMDM = PublishedData("slimpajama=1", (slimpajama("llama2/tokenizer.model", NO_GITHUB),))
# The shares of the released code; the paper rounds them to 70% and 30%. They are by rows, and so by tokens.
DIFFULLAMA = PublishedData(
    "slimpajama=0.693584,starcoder=0.306416",
    (slimpajama("runs/llama2_7b"), starcoder("runs/llama2_7b")),
    start="runs/llama2_7b",
)
DIFFUGPT_SMALL = PublishedData("fineweb=1", (fineweb("runs/gpt2", 512),), start="runs/gpt2")
DIFFUGPT_MEDIUM = PublishedData("fineweb=1", (fineweb("runs/gpt2_medium", 1024),), start="runs/gpt2_medium")
