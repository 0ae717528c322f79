"""monosemy cache. torch is imported only once everything has been checked."""

from __future__ import annotations

import inspect

from monosemy.commands.flags import parse
from monosemy.errors import EXIT
from monosemy.jobs.cache_config import CACHE_GROUPS, CacheConfig, CachePlan


def run(arguments: list[str]) -> int:
    description = inspect.cleandoc(CacheConfig.__doc__ or "")
    config = CacheConfig(**parse("monosemy cache", description, CACHE_GROUPS, arguments))
    plan = CachePlan.from_config(config)
    if plan.config.dry_run:
        print(plan.describe())
        plan.check_room()
        return 0
    from monosemy.jobs.cache import cache

    return EXIT[cache(plan)]
