"""Peak memory of importing and exporting weights, compared with the size of their checkpoint.

    JAX_PLATFORMS=cpu python experiments/benchmarks/interop_memory.py [MB] [DIR]

writes a LLaMA-shaped safetensors file of about that many megabytes of random numbers into DIR, imports it, exports it
again, and prints the peak resident memory of the process that did each.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH, VOCABULARY = 1024, 32000


def peak_megabytes() -> float:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # Linux counts in kB


def make_source(directory: Path, megabytes: int) -> None:
    """Write a source tensor by tensor, so that this takes less memory than importing it."""
    from diffusionlm.interop import safetensors

    F = 4 * WIDTH
    block = {f"self_attn.{n}_proj": (WIDTH, WIDTH) for n in "qkvo"}
    block |= {"mlp.gate_proj": (F, WIDTH), "mlp.up_proj": (F, WIDTH), "mlp.down_proj": (WIDTH, F)}
    block |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    bytes_per_block = 4 * sum(int(np.prod(shape)) for shape in block.values())
    layers = max(1, round((megabytes * 1e6 - 8 * VOCABULARY * WIDTH) / bytes_per_block))
    shapes = {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    specs = {f"{n}.weight": safetensors.Spec(shape, np.dtype(np.float32)) for n, shape in shapes.items()}
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True)
    safetensors.write(directory, specs, lambda name: rng.standard_normal(specs[name].shape, dtype=np.float32))
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "intermediate_size": F,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }
    (directory / "config.json").write_text(json.dumps(fields))


def import_source(source: Path, model: Path) -> tuple[float, float, float]:
    """Return the seconds, and the peak memory in MB before and after."""
    from diffusionlm.interop.importing import import_weights

    before, start = peak_megabytes(), time.monotonic()
    import_weights(source, model)
    return time.monotonic() - start, before, peak_megabytes()


def export_model(model: Path, output: Path) -> tuple[float, float, float]:
    """Return the seconds, and the peak memory in MB before and after."""
    from diffusionlm.interop.exporting import export_weights

    before, start = peak_megabytes(), time.monotonic()
    export_weights(model, output, "llama")
    return time.monotonic() - start, before, peak_megabytes()


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as directory:
        source, model, output = (Path(directory) / name for name in ("source", "model", "output"))
        for work, *paths in (
            (make_source, source, megabytes),
            (import_source, source, model),
            (export_model, model, output),
        ):
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # its peak is that of this work alone
                result = pool.apply(work, paths)
            if result:
                seconds, before, after = result
                size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file()) / 1e6
                print(
                    f"{work.__name__}: {size:.0f} MB in {seconds:.1f} s; peak {before:.0f} MB before, {after:.0f} after"
                )
                print(f"{after / size:.3f} times the checkpoint's size")


if __name__ == "__main__":
    main()
