"""Sampling from a model: from prompts or texts with gaps to new tokens. It imports nothing of training.

config           `SamplingConfig`: every setting of a generation
generate         `generate`, `infill`, `stream`: from token ids to token ids; start here
request          checked settings, a canvas, and the structure to compile for
programs         the compiled programs, and how a batch runs through them
canvas           the rows: given tokens, gaps, blocks, and the buckets that they are padded to
loop             the denoising loop; `state` is what its steps change
denoiser         a model as the loop sees it, and guidance
kv_cache         the positions that a step computes with a key/value cache
propose          a token for every open position, and how confident the model is; `draw` draws it
strategies       the masked positions that a step reveals; one function per strategy
device_settings  the settings as data for the device
"""
