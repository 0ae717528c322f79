"""monosemy list."""

from __future__ import annotations

from typing import Annotated

import tyro

from monosemy.jobs.pretrained import list_saes


def run(arguments: list[str]) -> int:
    def list_(repo: Annotated[str, tyro.conf.Positional], revision: str | None = None) -> int:
        """List the SAEs of a repository, with their layouts, sites, widths and sizes. Nothing but names is
        fetched.

        Args:
            repo: OWNER/REPO or OWNER/REPO/FOLDER on the hub, a release such as gemma-scope-2b-pt-res, or a
            folder.
            revision: A branch, tag or commit.
        """
        records = list_saes(repo, revision)
        lines = [
            ("SAE", "layout", "site", "width", "size", ""),
            *(
                (r.sae_id, r.format or "-", r.site or "-", _count(r.d_sae), _megabytes(r.bytes), r.note)
                for r in records
            ),
        ]
        w = [max(len(line[i]) for line in lines) for i in range(5)]
        for sae_id, layout, site, width, size, note in lines:
            line = f"{sae_id:{w[0]}}  {layout:{w[1]}}  {site:{w[2]}}  {width:>{w[3]}}  {size:>{w[4]}}  {note}"
            print(line.rstrip())
        return 0

    return tyro.cli(list_, args=arguments, prog="monosemy list", use_underscores=True)


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _megabytes(bytes_: int | None) -> str:
    return "-" if bytes_ is None else f"{bytes_ / 1e6:,.1f} MB"
