"""A tiny random model of bytes with a chat template, for tests of dialogues."""

import dataclasses
import functools

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import Config
from diffusionlm.data.jinja_templates import JinjaTemplate
from support.random_params import make_params
from support.tiny_pretrained import EOS, MODEL, sidecar

# "s:..." for a system message, "u:..." and "a:..." for turns, each on a line.
TEMPLATE = JinjaTemplate(
    "a test", "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}{{ 'a:' }}", {}
)


@functools.cache
def params():
    """Return the parameters of the model."""
    return make_params(MODEL)


def save(path, template=TEMPLATE, objective="mdm"):
    """Write the model as a checkpoint, and return its path."""
    written = None if template is None else template.to_dict()
    cfg = Config(model=dataclasses.replace(MODEL, causal=objective == "arm"), objective=objective)
    canvas = {"max_length": MODEL.max_length, "start_id": EOS}
    checkpoint.save_params(path, params(), sidecar(cfg, template=written, canvas=canvas))
    return str(path)
