"""Loading the backbone that heads are trained on: as it is, quantized, or with adapters.

Libraries that only some trainings need are imported where they are used: ``pip install 'euryale[train]'`` brings them.
"""

import importlib
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from euryale.runtime.model import checkpoint
from euryale.runtime.model.config import load_model_config

QUANTIZATIONS = ("none", "int8", "int4")
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def library(name: str):
    """Import a library of the ``train`` extra; ValueError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"this needs {name.split('.')[0]}: pip install 'euryale[train]' ({error})") from error


def load_backbone(directory: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """The backbone in ``dtype`` (None: as stored), without gradients, on the CPU: what is sharded must not fit one
    device. ValueError for an unsupported family or a damaged checkpoint."""
    load_model_config(directory, "auto")
    checkpoint.Checkpoint(directory)  # whether its files are there
    try:
        backbone = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library's errors are of many kinds
        raise ValueError(f"cannot load the backbone in {directory}: {error}") from error
    backbone.config.use_cache = False
    return backbone.requires_grad_(False).eval()


def quantize(backbone: PreTrainedModel, kind: str, device: torch.device) -> None:
    """Quantize the weights of the linear layers in place (torchao): int8 per output channel, or int4 in groups of 128
    where the hardware has kernels for it, layer by layer on ``device``. An lm_head that is tied to the embedding stays
    as it is. ValueError where this cannot be."""
    quantization = library("torchao.quantization")
    if kind == "int4" and device.type != "cuda":
        raise ValueError("--quantize int4 needs a CUDA GPU: give int8, which runs everywhere")
    config = quantization.Int8WeightOnlyConfig() if kind == "int8" else quantization.Int4WeightOnlyConfig()
    tied = backbone.get_output_embeddings() if backbone.config.tie_word_embeddings else None

    def chosen(module: nn.Module, _name: str) -> bool:
        return isinstance(module, nn.Linear) and module is not tied

    try:
        quantization.quantize_(backbone, config, filter_fn=chosen, device=device)
    except (ImportError, NotImplementedError, AssertionError) as error:  # torchao asserts what the hardware can do
        raise ValueError(f"this hardware or torchao cannot do --quantize {kind}: {error}") from error


def size_in_bytes(backbone: nn.Module) -> int:
    """Bytes of the weights on this rank, each counted once; what a quantized weight holds is counted as stored."""

    def stored(tensor: torch.Tensor) -> int:
        if hasattr(tensor, "to_local"):  # a shard
            return stored(tensor.to_local())
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.numel() * tensor.element_size()

    return sum(stored(p) for p in backbone.parameters())


def add_adapters(backbone: PreTrainedModel, rank: int) -> PreTrainedModel:
    """The backbone with LoRA adapters of ``rank`` in all layers' linear modules; only they have gradients."""
    peft = library("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(backbone, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def merged(
    directory: str, trained: dict[str, torch.Tensor], lora_rank: int, adapter_to: Path | None
) -> PreTrainedModel:
    """The backbone with what was trained: all its weights, or the adapters' merged into it, and the adapters alone
    written to ``adapter_to``. On the CPU, in float32."""
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
    """The dtype the runtime serves the checkpoint in, bfloat16 or float32: what is trained for it is stored in it."""
    return load_model_config(directory, "auto").dtype
