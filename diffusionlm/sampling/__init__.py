"""Sampling from trained models: needs a checkpoint and its sidecar, and imports nothing of training.

config      `SamplingConfig`: every setting of a generation
strategies  which masked positions a step reveals; one function a strategy
loop        `generate`: the denoising loop, compiled once per canvas shape
load        `load`: a checkpoint as an object that turns prompts into completions
display     a denoising trace in the terminal
"""
