"""Sampling from trained models: needs a checkpoint and its sidecar, and imports nothing of training.

config      `SamplingConfig`: every setting of a generation
generate    `generate`, `infill`, `stream`: from token ids to token ids; start here
canvas      the rows: given tokens, gaps, blocks
loop        the denoising loop, compiled once per canvas shape
denoiser    a model as the loop sees it, and guidance
windows     which positions a step computes with a key/value cache
propose     a token for every open position, and how sure the model is; `draw` draws it
strategies  which masked positions a step reveals; one function a strategy
settings    the settings as data for the device
load        `load`: a checkpoint as an object that turns prompts into completions
display     a denoising trace in the terminal; `html` as a web page
"""
