"""monosemy convert."""

from __future__ import annotations

from typing import Annotated

import tyro

from monosemy import formats
from monosemy.commands.flags import run_folder
from monosemy.errors import invalid
from monosemy.jobs import pretrained, transcoder_set


def run(arguments: list[str]) -> int:
    def convert(
        folder: Annotated[str, tyro.conf.Positional],
        out: Annotated[str, tyro.conf.Positional],
        to: str,
        format: str | None = None,
        unfinished: bool = False,
        trainer: int | None = None,
        features: str | None = None,
    ) -> int:
        """Write an SAE in another tool's layout, or a tool's SAE in ours. What the layout has no place for
        goes to monosemy.json beside it.

        Args:
            folder: An SAE's own folder, its file in layouts of one file for each SAE, or its name on the hub,
            OWNER/REPO/SAE_ID. For circuit_tracer a run's folder.
            out: A new folder.
            to: native, dictionary_learning, sae_lens or sparsify; circuit_tracer for the transcoders of a
            run, one of each layer.
            format: dictionary_learning, qwen_scope or goodfire: opens a pickle of that layout, restricted to
            tensors. Others are told apart
                by their files.
            unfinished: Also an SAE whose training did not complete.
            trainer: For circuit_tracer, which of a run's transcoders at each layer: N of trainer_N.
            features: For circuit_tracer, what its page shows of latents: files, one for each, which its own
            server finds (the default); packed, for the hub; or none.
        """
        if to == "circuit_tracer":
            run, layout = run_folder(folder), features or "files"
            transcoder_set.write_transcoder_set(
                run, out, trainer=trainer, unfinished=unfinished, features=layout
            )
            print(out)
            return 0
        for name, value in (("trainer", trainer), ("features", features)):
            if value is not None:
                allowed = "left out but for --to circuit_tracer"
                raise invalid(name, value, allowed, "name the SAE's folder")
        found = pretrained.resolve(folder, format=format)
        formats.convert(found.path, out, to, format=found.format, unfinished=unfinished, source=found.source)
        print(out)
        return 0

    return tyro.cli(convert, args=arguments, prog="monosemy convert", use_underscores=True)
