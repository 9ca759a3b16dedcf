"""Makes the checkpoints and logits of this folder with transformers and PyTorch: `python tests/data/parity/make.py`.

Tiny random models, each as `save_pretrained` writes it, and the logits of its own forward pass for some ids.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent
SMALL = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2}
ROTARY = SMALL | {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
MODELS = {
    "gpt2": transformers.GPT2Config(**SMALL, n_embd=24, n_layer=2, n_head=3, n_positions=32),
    "llama": transformers.LlamaConfig(**ROTARY, rms_norm_eps=1e-5, rope_theta=5000.0),
    "qwen2": transformers.Qwen2Config(**ROTARY, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True),
}


def main() -> None:
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms too, which start as constants; far from flat logits
                parameter.add_(torch.randn_like(parameter) * 0.2)
            ids = torch.randint(0, config.vocab_size, (2, 17))
            logits = model(ids).logits
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(FOLDER / name / "golden.npz", ids=ids.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    main()
