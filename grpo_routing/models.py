"""Where a policy's weights come from. A name in YAML is a key of MODELS."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grpo_routing.organism import OrganismRecipe
from grpo_routing.preparation import Preparation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("grpo_routing")
AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLASH = "flash_attention_2"
ATTENTION = ("sdpa", "eager", FLASH)


class ModelError(RuntimeError):
    """A model cannot be loaded; the message says what was expected, what came and what to do."""


@dataclass(frozen=True)
class HubModel:
    """A pretrained causal language model: `path` is a hub name or a local folder. Dense Qwen3, Llama and the like, and models with gated
    delta nets (Qwen3-Next, Qwen3.5; of those with a vision tower the language model).

    dtype: auto                 bfloat16 on a GPU, float32 on a CPU
    attn_implementation: auto   what transformers takes for this architecture: sdpa, or eager where it has none; a run logs which
    """

    path: str
    dtype: str
    device: str
    attn_implementation: str
    prepare: Preparation
    cache: str

    def __post_init__(self) -> None:
        if faults := [fault for fault in (self._no_folder(), self._no_device(), self._no_dtype(), self._no_attention()) if fault]:
            raise ValueError("\n".join(faults))

    def _no_folder(self) -> str | None:
        """A hub name is asked after when it is loaded: planning needs no network."""
        folder = Path(self.path).expanduser()
        if (folder / "config.json").is_file() or (not folder.exists() and self.path.count("/") < 2 and self.path[:1] not in "/.~"):
            return None
        came = "has no config.json" if folder.is_dir() else "is a file" if folder.exists() else "is not there"
        return (f"model.path must be a folder with a model (config.json, weights, tokenizer) or a name on the hub such as Qwen/Qwen3-4B; "
                f"{self.path} {came}. docs/real_models.md says how to get one")

    def _no_device(self) -> str | None:
        if self.device not in ("cpu", "cuda") and not self.device.removeprefix("cuda:").isdecimal():
            return f"model.device must be cpu, cuda or cuda:<number>; got {self.device!r}"
        return None

    def _no_dtype(self) -> str | None:
        return None if self.dtype in (AUTO, *DTYPES) else f"model.dtype must be one of {', '.join((AUTO, *DTYPES))}; got {self.dtype!r}"

    def _no_attention(self) -> str | None:
        if self.attn_implementation not in (AUTO, *ATTENTION):
            return f"model.attn_implementation must be one of {', '.join((AUTO, *ATTENTION))}; got {self.attn_implementation!r}"
        if self.attn_implementation != FLASH:
            return None
        lacks = [said for said, holds in {
            f"a GPU (model.device={self.device})": self.device != "cpu",
            f"half precision (model.dtype={self.dtype})": self.precision != "float32",
            "the package flash-attn, which is not installed (pip install flash-attn --no-build-isolation)": bool(find_spec("flash_attn")),
        }.items() if not holds]
        return f"model.attn_implementation={FLASH} needs {' and '.join(lacks)}; choose sdpa, which needs nothing" if lacks else None

    @property
    def precision(self) -> str:
        """The dtype's name, with `auto` decided by the device."""
        return self.dtype if self.dtype != AUTO else "float32" if self.device == "cpu" else "bfloat16"

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self.read(self.place)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What the model reads text with, without its weights. Raises ModelError."""
        from transformers import AutoTokenizer

        return self._had(lambda: AutoTokenizer.from_pretrained(self.place))

    @property
    def place(self) -> str:
        """The hub name, or the folder with ~ written out."""
        folder = Path(self.path).expanduser()
        return str(folder) if folder.is_dir() else self.path

    @property
    def origin(self) -> str:
        """What a prepared model is a preparation of."""
        said = f"{self.path} {self.precision} {self.device.partition(':')[0]} {self.attn_implementation}"
        return f"hub-{Path(self.path).name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"

    def read(self, folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Raises ModelError. A GPU is asked for here: sweeps are planned where there is none."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self.device != "cpu" and not torch.cuda.is_available():
            build = f"torch {torch.__version__}, built {'for CUDA ' + torch.version.cuda if torch.version.cuda else 'without CUDA'}"
            raise ModelError(f"model.device={self.device} but torch sees no GPU here ({build}); run where there is one, with a torch for "
                             "its CUDA (docs/real_models.md), or use model.device=cpu (slow) or model=organism")
        asked = None if self.attn_implementation == AUTO else self.attn_implementation
        model = self._had(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[self.precision], attn_implementation=asked))
        chosen = model.config._attn_implementation
        log.info("model %s: %s, %s on %s, attn_implementation=%s%s", folder, model.config.model_type, self.precision, self.device, chosen,
                 "" if asked else f" (chosen by auto; others: {', '.join(one for one in ATTENTION if one != chosen)})")
        return model.to(self.device), AutoTokenizer.from_pretrained(folder)

    def _had(self, load: Callable) -> Any:
        try:
            return load()
        except (OSError, ValueError, ImportError) as problem:  # no network or file, an architecture or attention that is not there
            raise ModelError(f"model.path={self.path} could not be loaded ({type(problem).__name__}: {str(problem).splitlines()[0]}). On a "
                             f"node without a network give the folder of a model that was downloaded elsewhere: hf download {self.path} "
                             "--local-dir FOLDER, then model.path=FOLDER") from problem


MODELS = {"organism": OrganismRecipe, "tiny_random": OrganismRecipe, "hub": HubModel}
