"""Programs that a model wrote, run where they can do no harm: in bubblewrap or namespaces of our own."""

from diffusionlm.evaluation.sandbox.run import find as find
