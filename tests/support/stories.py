"""Stories for infilling."""

from diffusionlm.evaluation.stories import Story

STORIES = [
    Story("Tom had a red ball.", " He lost it in the park.", " He was sad."),
    Story("It rained.", " She ran home and got dry.", " She slept.\nEnd."),
    Story("One.", " Two three four.", ""),
]
