"""sparsify's side, run by the interpreter of its own environment: files are all that passes between it and
us.

    sparsify_side.py write FOLDER          its SAE, with random weights, written to FOLDER/layers.3 by its own
    save_to_disk; a bfloat16 one and two transcoders beside
    sparsify_side.py reconstruct FOLDER    its load_from_disk opens every FOLDER/NAME, and reconstructs
    FOLDER/x.safetensors
    sparsify_side.py step FOLDER           of every FOLDER/NAME the loss of a transcoder on x and y of
    FOLDER/pairs.safetensors, and its gradients, in FOLDER/NAME/step.safetensors

Of the first two FOLDER/NAME/reconstruction.safetensors then holds x [B, D], its latents f [B, F] and its
reconstruction x_hat [B, D].
"""

import os
import sys
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel wants a GPU

import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

B, D, F = 16, 8, 24


@torch.no_grad()
def write(folder: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    folder.mkdir(parents=True, exist_ok=True)
    for name, dtype in (("layers.3", torch.float32), ("layers.4", torch.bfloat16)):
        sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=4), dtype=dtype)
        for tensor in sae.state_dict().values():
            tensor.copy_(0.4 * torch.randn(tensor.shape, generator=draw))
        sae.save_to_disk(folder / name)
    save_file({"x": torch.randn(B, D, generator=draw)}, folder / "x.safetensors")
    for name, skip in (("layers.3.mlp", False), ("layers.4.mlp", True)):
        cfg = SparseCoderConfig(num_latents=F, k=4, transcode=True, skip_connection=skip)
        coder = SparseCoder(D, cfg, dtype=torch.float32)
        for tensor in coder.state_dict().values():
            tensor.copy_(0.4 * torch.randn(tensor.shape, generator=draw))
        coder.save_to_disk(folder / name)


@torch.no_grad()
def reconstruct(folder: Path) -> None:
    x_BD = load_file(folder / "x.safetensors")["x"]
    for path in sorted(folder.glob("*/cfg.json")):
        sae = SparseCoder.load_from_disk(path.parent)
        x = x_BD[:, : sae.d_in]
        values, indices, _ = sae.encode(x.to(sae.dtype))
        f = torch.zeros(len(x), sae.num_latents, dtype=values.dtype).scatter_(1, indices, values)
        # a skip connection is added by its forward alone
        x_hat = sae.decode(values, indices) if sae.W_skip is None else sae(x.to(sae.dtype)).sae_out
        made = {"x": x, "f": f, "x_hat": x_hat}
        save_file(
            {name: tensor.float().contiguous() for name, tensor in made.items()},
            path.parent / "reconstruction.safetensors",
        )


def step(folder: Path) -> None:
    pairs = load_file(folder / "pairs.safetensors")
    for path in sorted(folder.glob("*/cfg.json")):
        coder = SparseCoder.load_from_disk(path.parent)
        out = coder(x=pairs["x"], y=pairs["y"])
        out.fvu.backward()
        gradients = {name: p.grad.contiguous() for name, p in coder.named_parameters()}
        save_file(gradients | {"loss": out.fvu.detach()}, path.parent / "step.safetensors")


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "write":
        write(folder)
    if command == "step":
        step(folder)
    else:
        reconstruct(folder)
