"""TODO: one sentence."""

import jax

# Streams of a seed that must not meet. A key is only ever folded, or only split: `fold_in(k, 1)` is `split(k)[1]`.
INITIALISATION, TRAINING, EVALUATION, ANNEALING = range(4)


def stream_key(seed: int, stream: int) -> jax.Array:
    """The key of one use of a seed."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def noise_key(seed: int, batch_index: jax.Array) -> jax.Array:
    """The key of all training noise of one global batch."""
    return jax.random.fold_in(stream_key(seed, TRAINING), batch_index)


def annealing_key(seed: int, batch_index: jax.Array) -> jax.Array:
    """The key of the attention mask of one global batch, while causal attention opens up."""
    return jax.random.fold_in(stream_key(seed, ANNEALING), batch_index)


def evaluation_keys(draw: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys of one noise draw on held-out records, of their times and of their masks: the same in every run."""
    key_times, key_masks = jax.random.split(jax.random.fold_in(stream_key(0, EVALUATION), draw))
    return key_times, key_masks
