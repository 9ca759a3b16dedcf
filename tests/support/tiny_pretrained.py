"""One tiny model of bytes as a checkpoint, for all tests of loaded models, so that they share programs."""

import dataclasses

from diffusionlm import config_io
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.config import Config, ModelConfig
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.model.spec import ModelSpec
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import GenerationResult, generate

EOS = ByteTokenizer.eos_id
MODEL = ModelConfig(
    d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, vocab_size=257, max_length=64
)


SPEC = dataclasses.replace(ModelSpec.of(Config(model=MODEL)), eos_ids=(EOS,))


def sidecar(cfg: Config = Config(model=MODEL), **changes) -> Sidecar:  # noqa: B008
    values = dict(
        objective=cfg.objective,
        model=config_io.to_dict(cfg.model),
        diffusion=config_io.to_dict(cfg.diffusion),
        mask_id=cfg.mask_id,
        eos_id=EOS,
        suppressed_ids=cfg.suppressed_ids,
        tokenizer=ByteTokenizer().to_dict(),
        canvas={"max_length": 64},
    )
    return Sidecar(**{**values, **changes})


def generated(model: LoadedModel, prompts: list[list[int]], sampling: SamplingConfig) -> GenerationResult:
    """Sample after tokens on the devices of the model, so that it shares the programs of its methods."""
    with model.on_mesh():
        return generate(model.params, model.config, prompts, sampling)


def with_sidecar(model: LoadedModel, **changes) -> LoadedModel:
    """The same parameters under another sidecar."""
    return dataclasses.replace(model, sidecar=sidecar(**changes))
