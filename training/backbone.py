"""Loading of backbones for training: unchanged, quantized, or with LoRA adapters.

Optional libraries are imported where they are used; ``pip install 'euryale[train]'`` installs them.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from euryale.runtime.model import checkpoint
from euryale.runtime.model.config import load_model_config

QUANTIZATIONS = ("none", "int8", "int4")
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def import_library(name: str) -> Any:
    """Import a library of the ``train`` extra. ValueError with the install command if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"this needs {name.split('.')[0]}: pip install 'euryale[train]' ({error})") from error


def load_backbone(directory: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load the backbone on the CPU in ``dtype`` (None: as stored), in evaluation mode and without gradients.

    Loading on the CPU allows models that exceed one device and are sharded later. ValueError for an unsupported family
    or a damaged checkpoint.
    """
    load_model_config(directory, "auto")
    checkpoint.Checkpoint(directory)  # checks that its files exist
    try:
        backbone = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds of errors
        raise ValueError(f"cannot load the backbone in {directory}: {error}") from error
    backbone.config.use_cache = False
    return backbone.requires_grad_(False).eval()


def quantize(backbone: PreTrainedModel, kind: str, device: torch.device) -> None:
    """Quantize the weights of the linear layers in place with torchao, layer by layer on ``device``.

    ``kind`` "int8" quantizes per output channel, "int4" in groups of 128 on CUDA GPUs. An lm_head tied to the embedding
    stays unquantized. ValueError if the hardware or torchao does not support ``kind``.
    """
    quantization = import_library("torchao.quantization")
    if kind == "int4" and device.type != "cuda":
        raise ValueError("--quantization int4 needs a CUDA GPU: use int8, which runs on all devices")
    config = quantization.Int8WeightOnlyConfig() if kind == "int8" else quantization.Int4WeightOnlyConfig()
    tied = backbone.get_output_embeddings() if backbone.config.tie_word_embeddings else None

    def is_quantized(module: nn.Module, _name: str) -> bool:
        return isinstance(module, nn.Linear) and module is not tied

    try:
        quantization.quantize_(backbone, config, filter_fn=is_quantized, device=device)
    except (ImportError, NotImplementedError, AssertionError) as error:  # torchao checks the hardware with assert
        raise ValueError(f"--quantization {kind} is not supported here: {error}") from error


def size_in_bytes(backbone: nn.Module) -> int:
    """Return the bytes of this rank's parameters, each counted once; quantized weights count as stored."""

    def stored(tensor: torch.Tensor) -> int:
        if hasattr(tensor, "to_local"):  # a sharded parameter
            return stored(tensor.to_local())
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.numel() * tensor.element_size()

    return sum(stored(p) for p in backbone.parameters())


def add_adapters(backbone: PreTrainedModel, rank: int) -> PreTrainedModel:
    """Return the backbone with LoRA adapters of ``rank`` in the linear modules of all layers; only the adapters have
    gradients, in float32."""
    peft = import_library("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(backbone, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def load_trained(
    directory: str, trained: dict[str, torch.Tensor], lora_rank: int, adapter_to: Path | None
) -> PreTrainedModel:
    """Return the backbone with ``trained`` weights, in float32 on the CPU.

    With ``lora_rank`` 0, ``trained`` holds all weights. Otherwise it holds the adapters' weights, which are merged into
    the backbone and, if ``adapter_to`` is given, also written there.
    """
    backbone = load_backbone(directory, torch.float32)
    if lora_rank:
        adapted = add_adapters(backbone, lora_rank)
        adapted.load_state_dict(trained, strict=False)
        if adapter_to is not None:
            adapted.save_pretrained(adapter_to)
        return adapted.merge_and_unload()
    backbone.load_state_dict(trained)
    return backbone


def stored_dtype(directory: str) -> torch.dtype:
    """Return the dtype in which the runtime serves the checkpoint, bfloat16 or float32; trained weights are stored in
    it."""
    return load_model_config(directory, "auto").dtype
