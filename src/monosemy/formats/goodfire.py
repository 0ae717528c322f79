"""Goodfire's `*.pth`: ReLU SAEs, each a pickle of two linear layers, whose encoder sees x itself.

qresearch's SAE of DeepSeek's model has the same under shorter names. The weights are [out, in], as nn.Linear
keeps them; model and layer stand in the file's name: `Llama-3.1-8B-Instruct-SAE-l19.pth`.
"""

from __future__ import annotations

import re
from pathlib import Path

from monosemy.formats import untrusted
from monosemy.formats.parts import Names, Parts, Stored, dtype_of, matrix_shape, only, renamed

OWNERS = {"Llama": "meta-llama", "DeepSeek": "deepseek-ai"}


def read(file: Path, source: str) -> Parts:
    """Read the SAE in a file. Raises ValueError for one that is damaged, or holds anything else."""
    tensors = untrusted.state_dict(file)
    ending = "_linear" if "encoder_linear.weight" in tensors else ""
    encoder, decoder = f"encoder{ending}", f"decoder{ending}"
    names: Names = {
        "W_enc": f"{encoder}.weight",
        "b_enc": f"{encoder}.bias",
        "W_dec": Stored(f"{decoder}.weight", transposed=True),
        "b_dec": f"{decoder}.bias",
    }
    only(tensors, names.values(), file.name)
    ours = renamed(tensors, names, file.name)
    d_sae, d_in = matrix_shape(ours["W_enc"], f"{file.name}: {encoder}.weight")
    named = re.search(r"(?:^|/)((Llama|DeepSeek)-[\w.-]+)-SAE-l(\d{1,4})\.pth?$", source)
    config = {
        "site": f"resid_post.{named[3]}" if named else None,
        "model": f"{OWNERS[named[2]]}/{named[1]}" if named else None,
        "dtype": dtype_of(tensors),
    }
    return Parts("standard", d_in, d_sae, {}, ours, file.name, False, config, names=names)
