# Install diffusionlm with the files that come with it, unless they are here. No account and no key is needed.
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = ""  # an address for `git clone`; empty: upload a zip file of the repository beside this notebook


def package():
    """Return the file of the installed package, or None; a mere directory of that name is no package."""
    spec = importlib.util.find_spec("diffusionlm")
    return Path(spec.origin) if spec and spec.origin else None


def checkouts():
    """Yield the places where a checkout of diffusionlm may be, the nearest first."""
    if package():
        yield package().parents[1]
    yield from (Path.cwd(), *Path.cwd().parents)
    yield from (path for path in (*Path.cwd().glob("*"), *Path.cwd().glob("diffusionlm_checkout/*")) if path.is_dir())


def checkout():
    """Return the first of them that has the library and the small models that ship with it."""
    return next((path for path in checkouts() if (path / "docs/results/models").is_dir()), None)


if checkout() is None and REPOSITORY:
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, "diffusionlm_checkout"], check=True)
for archive in Path.cwd().glob("diffusionlm*.zip"):
    if checkout() is None:
        zipfile.ZipFile(archive).extractall("diffusionlm_checkout")
CHECKOUT = checkout()
if CHECKOUT is None:
    raise SystemExit("Upload a zip file of the repository, diffusionlm.zip, beside this notebook, and run this again.")
if package() is None:
    # A wheel, which a running kernel can import; an editable installation would need a restart.
    wanted = [f"{CHECKOUT}[docs]"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(".")[0])
        wanted.append("jax[cuda13]" if driver >= 580 else "jax[cuda12]")
    elif os.environ.get("TPU_ACCELERATOR_TYPE") or Path("/dev/accel0").exists():
        wanted.append("jax[tpu]")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
    importlib.invalidate_caches()

import jax

import diffusionlm as dlm

SHORT = bool(os.environ.get("DIFFUSIONLM_SHORT"))  # the tests run a few steps of everything
print(f"diffusionlm {dlm.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}")
