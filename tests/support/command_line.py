"""Call the command line on a tiny `demo`, and check that a mistake is one line."""

LENGTH = 16

# A masked diffusion model from scratch.
PLAIN = {
    "diffusion.arm_steps": 0,
    "diffusion.alignment": "same",
    "diffusion.weighting": "bound",
    "optim.arm_peak_lr": 0.0,
    "optim.name": "adamw",
}

# `demo` at a size that trains in seconds, on the eight devices of the tests, with the byte tokenizer's vocabulary.
TINY = {
    "model.d_model": 16,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "model.n_kv_heads": 2,
    "model.head_dim": 8,
    "model.d_ff": 32,
    "model.vocab_size": 257,
    **PLAIN,
    "data.sequence_length": LENGTH,
    "data.batch_size": 8,
    "optim.warmup_steps": 1,
    "run.steps": 2,
    "run.eval_records": 8,
    "run.eval_draws": 2,
    "run.showcase": False,
}


def options(values):
    """Return the words of the command line that set these fields."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def assert_one_line(captured, parts):
    """Check that stderr is one line of the program that has all these parts, and stdout is empty."""
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("diffusionlm: error: ")
    for part in parts:
        assert part in captured.err
