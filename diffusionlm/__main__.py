"""`python -m diffusionlm` is the `diffusionlm` command."""

from diffusionlm.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
