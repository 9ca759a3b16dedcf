"""Random keys: each derives from a seed, a use and an index, never from earlier draws."""

import jax

# Uses of a seed, whose keys must never be equal. A key is only ever folded into, or only ever split: `fold_in(k, 1)` is
# the same key as `split(k)[1]`.
INITIALISATION, TRAINING, EVALUATION, ANNEALING, PROMPTS = range(5)


def stream_key(seed: int, stream: int) -> jax.Array:
    """Return the key of one use of a seed."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def noise_key(seed: int, batch_index: jax.Array) -> jax.Array:
    """Return the key of all training noise of one global batch."""
    return jax.random.fold_in(stream_key(seed, TRAINING), batch_index)


def annealing_key(seed: int, batch_index: jax.Array) -> jax.Array:
    """Return the key of the attention mask of one global batch, while causal attention opens up."""
    return jax.random.fold_in(stream_key(seed, ANNEALING), batch_index)


def prompts_key(seed: int, batch_index: jax.Array) -> jax.Array:
    """Return the key that decides which prompts of one global batch are masked."""
    return jax.random.fold_in(stream_key(seed, PROMPTS), batch_index)


def evaluation_keys(draw: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the keys of one noise draw on held-out records, for times and for masks; every run has the same."""
    key_times, key_masks = jax.random.split(jax.random.fold_in(stream_key(0, EVALUATION), draw))
    return key_times, key_masks


def example_keys(key: jax.Array, index_B: jax.Array) -> jax.Array:
    """Return the key of each example: of its position in the global batch, or of a held-out record by its index."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)
