"""SAELens' side, run by the interpreter of its own environment: files are all that passes between it and us.

    sae_lens_side.py write FOLDER          its SAEs, with random weights, written to FOLDER/NAME by its own
    save_model and save_inference_model
    sae_lens_side.py reconstruct FOLDER    its load_from_disk opens every FOLDER/NAME, and reconstructs
    FOLDER/x.safetensors
    sae_lens_side.py published FOLDER      its loaders for others' layouts open what FOLDER/saes.json names,
    out of the hub cache in FOLDER/hub

Either way FOLDER/NAME/reconstruction.safetensors then holds x [B, D], its latents f [B, F] and its
reconstruction x_hat [B, D], or of a transcoder its output [B, OUT].
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

if sys.argv[1] == "published":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path(sys.argv[2]) / "hub")}

import torch
from huggingface_hub import hf_hub_download
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

B, D, F = 16, 8, 24
SIZES = {"d_in": D, "d_sae": F}
ABOUT = {
    "model_name": "EleutherAI/pythia-70m-deduped",
    "hook_name": "blocks.3.hook_resid_post",
    "context_size": 128,
    "prepend_bos": True,
}
# between two places, the second of another width or not
OUT = 6
TRANSCODER = {"apply_b_dec_to_input": False, "d_out": OUT}
ABOUT_TRANSCODERS = ABOUT | {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
BATCH = {"k": 4, "decoder_init_norm": None}
MADE = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "standard_uncentered": (StandardSAE, StandardSAEConfig, {"apply_b_dec_to_input": False}),
    "standard_bfloat16": (StandardSAE, StandardSAEConfig, {"dtype": "bfloat16"}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "gated_uncentered": (GatedSAE, GatedSAEConfig, {"apply_b_dec_to_input": False}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {"apply_b_dec_to_input": False}),
    "jumprelu_centered": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 4}),
    "topk_uncentered": (TopKSAE, TopKSAEConfig, {"k": 4, "apply_b_dec_to_input": False}),
    "topk_rescaled": (TopKSAE, TopKSAEConfig, {"k": 4, "rescale_acts_by_decoder_norm": True}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, BATCH),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        BATCH | {"matryoshka_widths": [8, F]},
    ),
}
MADE_TRANSCODERS = {
    "transcoder": (Transcoder, TranscoderConfig, TRANSCODER),
    "skip_transcoder": (SkipTranscoder, SkipTranscoderConfig, TRANSCODER),
    "jumprelu_transcoder": (JumpReLUTranscoder, JumpReLUTranscoderConfig, TRANSCODER | {"d_out": D}),
    "jumprelu_skip_transcoder": (
        JumpReLUSkipTranscoder,
        JumpReLUSkipTranscoderConfig,
        TRANSCODER | {"d_out": D},
    ),
}


@torch.no_grad()
def write(folder: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    folder.mkdir(parents=True, exist_ok=True)
    for name, how in MADE.items():
        write_one(folder / name, *how, ABOUT, draw)
    save_file({"x": torch.randn(B, D, generator=draw)}, folder / "x.safetensors")
    for name, how in MADE_TRANSCODERS.items():
        write_one(folder / name, *how, ABOUT_TRANSCODERS, draw)


def write_one(folder: Path, kind: type, config: type, settings: dict, about: dict, draw) -> None:
    sae = kind(config(**SIZES, **settings, metadata=SAEMetadata(**about)))
    for name_of, tensor in sae.state_dict().items():
        drawn = 0.4 * torch.randn(tensor.shape, generator=draw)
        tensor.copy_(drawn.abs() if "threshold" in name_of else drawn)
    if hasattr(sae, "save_inference_model"):
        sae.save_inference_model(folder)
    else:
        sae.save_model(folder)


@torch.no_grad()
def reconstruct(folder: Path) -> None:
    x_BD = load_file(folder / "x.safetensors")["x"]
    for path in sorted(folder.glob("*/cfg.json")):
        sae = SAE.load_from_disk(path.parent)
        x = x_BD[:, : sae.cfg.d_in]
        f = sae.encode(x)
        made = {"x": x, "f": f, "x_hat": output(sae, x, f)}
        save_file(
            {name: tensor.float().contiguous() for name, tensor in made.items()},
            path.parent / "reconstruction.safetensors",
        )


@torch.no_grad()
def published(folder: Path) -> None:
    loaders.get_safetensors_tensor_shapes = shapes_on_disk
    for name, asked in json.loads((folder / "saes.json").read_text()).items():
        loader = partial(
            overridden, loaders.NAMED_PRETRAINED_SAE_LOADERS[asked["loader"]], asked["overrides"]
        )
        sae, *_ = SAE.from_pretrained_with_cfg_and_sparsity(asked["repo"], asked["sae_id"], converter=loader)
        if asked["scale"] is not None:  # which from_pretrained folds in for releases that its table has
            sae.fold_activation_norm_scaling_factor(asked["scale"])
        x = load_file(folder / name / "x.safetensors")["x"]
        # [B, heads, d_head], which it puts side by side
        heads = (1, -1) if sae.cfg.reshape_activations == "hook_z" else (-1,)
        f = sae.encode(x.unflatten(-1, heads))
        x_hat = output(sae, x, f)
        made = {"f": f, "x_hat": x_hat.reshape(len(x_hat), -1)}
        save_file(
            {of: tensor.float().contiguous() for of, tensor in made.items()},
            folder / name / "reconstruction.safetensors",
        )


def output(sae, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """What it makes of x, whose latents are f; a skip connection is added by its forward alone."""
    return sae(x) if hasattr(sae, "W_skip") else sae.decode(f)


def overridden(loader, overrides: dict, *, cfg_overrides: dict, **arguments):
    """A loader told the sizes of small SAEs, which it has from tables of models."""
    return loader(cfg_overrides=cfg_overrides | overrides, **arguments)


def shapes_on_disk(repo_id: str, filename: str) -> dict[str, list[int]]:
    """What SAELens asks of the hub's server: the shapes in a safetensors file."""
    with safe_open(hf_hub_download(repo_id, filename), framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "published":
        published(folder)
    else:
        if command == "write":
            write(folder)
        reconstruct(folder)
