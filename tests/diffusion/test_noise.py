"""Keys: no two uses of a seed share one."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.diffusion.noise import INITIALISATION, evaluation_keys, noise_key, stream_key


def test_no_key_is_used_twice():
    """`fold_in(k, 1)` is `split(k)[1]`, so streams of one seed can meet where nobody expects it."""
    batches, draws = jnp.arange(40), jnp.arange(8)
    training = jax.vmap(lambda b: noise_key(0, b))(batches)
    evaluation = jnp.concatenate(jax.vmap(evaluation_keys)(draws))
    initial = stream_key(0, INITIALISATION)[None]
    roots = jnp.concatenate([training, evaluation, initial])
    children = jax.vmap(lambda k: jax.random.split(k, 8))(roots).reshape(-1)
    data = np.asarray(jax.random.key_data(jnp.concatenate([roots, children])))
    assert len({tuple(row) for row in data.tolist()}) == len(data)
