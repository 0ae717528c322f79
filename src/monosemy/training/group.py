"""SAEs of one shape that share arrays, the optimizer's update and, on a GPU, one CUDA graph.

B tokens, D d_in, F d_sae, S SAEs of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from monosemy import ops
from monosemy.former_names import current_names
from monosemy.limits import GRADIENTS_AT_ONCE, branches
from monosemy.system.streams import side_by_side
from monosemy.training.graphs import CUDAGraphCache
from monosemy.training.trainer import READBACK_EVERY, SAETrainer, StepResult


class TrainerGroup:
    """The owner of S trainers' weights and optimizer: arrays [S, ..], which one launch updates, and one loop
    over a step.

    On a GPU all S forward passes come before one update. On a CPU each SAE is updated after its own backward
    pass: no launch is saved there, and its gradients are still in the cache.
    """

    def __init__(self, trainers: Sequence[SAETrainer]) -> None:
        """Move the trainers' parameters into shared arrays, of which theirs become views."""
        self.trainers = list(trainers)
        self.index = {trainer.name: s for s, trainer in enumerate(self.trainers)}
        params = [dict(trainer.sae.named_parameters()) for trainer in self.trainers]
        self.params: dict[str, Tensor] = {}
        for name, first in params[0].items():
            alone = len(params) == 1
            self.params[name] = first.data[None] if alone else torch.stack([p[name].data for p in params])
            for s, p in enumerate(params):
                p[name].data = self.params[name][s]
        S = len(self.trainers)
        self.device = next(iter(self.params.values())).device
        # a sharded SAE's steps run as they are: its collectives are the process group's
        whole = all(trainer.shards is None for trainer in self.trainers)
        self.graphs = CUDAGraphCache() if self.device.type == "cuda" and whole else None
        self.launches = [slice(0, S)] if self.graphs else [slice(s, s + 1) for s in range(S)]
        self.scales_2S = torch.zeros(2, S, device=self.device)  # learning rate, factor on sparsity penalties
        self.last: dict[str, dict[str, Tensor]] = {}
        """By SAE, the last step's metrics as scalars, which the next step overwrites."""
        self._metrics_SN: Tensor | None = None

    @staticmethod
    def key(trainer: SAETrainer) -> tuple[Any, ...]:
        """Return what trainers of one group have in common."""
        sae = trainer.sae
        shapes = tuple((name, p.shape) for name, p in sae.named_parameters())
        device = next(sae.parameters()).device
        how = (trainer.bf16, trainer.on_nonfinite, device, trainer.shards)
        return sae.constraint, sae.clip, sae.betas, shapes, *how

    @cached_property
    def optimizer(self) -> ops.Optimizer:
        """The update of all SAEs; made when it is first needed, from the weights that are there then."""
        first = self.trainers[0]
        # a CPU gathers in float32
        copies = ("W_enc", "b_enc", "W_dec") if self.params["W_enc"].is_cuda else ("W_enc",)
        return ops.Optimizer(
            self.params,
            decoder="W_dec",
            constraint=first.sae.constraint,
            clip=first.sae.clip,
            betas=first.sae.betas,
            bf16_copies=copies if first.bf16 else (),
            shards=first.shards,
            of_latents=first.latent_tensors,
        )

    def step(self, batches: Mapping[str, Tensor], step: int) -> None:
        """Take one optimizer step of every SAE, on its batch of scaled activations [B, D].

        Nothing in it waits for a GPU.
        """
        for trainer in self.trainers:
            trainer.prepare(batches[trainer.name], step)
        lr = [trainer.lr * trainer.schedule.lr(step) for trainer in self.trainers]
        sparsity = [trainer.sae.sparsity_scale(step, trainer.schedule) for trainer in self.trainers]
        scales = torch.tensor([lr, sparsity])
        self.scales_2S.copy_(scales.pin_memory() if self.device.type == "cuda" else scales, non_blocking=True)
        if self.graphs is None:
            self._run(batches, step)
        else:
            self.graphs(self._run, tuple(trainer.phase(step) for trainer in self.trainers), batches, step)
        if step % READBACK_EVERY == 0:
            for trainer in self.trainers:
                trainer.schedule_readback(len(batches[trainer.name]))

    def _run(self, batches: Mapping[str, Tensor], step: int) -> None:
        """Step the SAEs launch by launch."""
        for members in self.launches:
            self._launch(members, batches, step)

    def _launch(self, members: slice, batches: Mapping[str, Tensor], step: int) -> None:
        """Run forward passes, one update and what follows from it; codes and gradients go when it returns."""
        trainers, lr_S = self.trainers[members], self.scales_2S[0, members]
        results = self._forward(members, batches, step)
        for trainer, result in zip(trainers, results, strict=True):
            trainer.sae.adjust_gradients_(result.grads)
        grads = {name: [result.grads[name] for result in results] for name in self.params}
        known = set.intersection(*(set(result.row_norms) for result in results))
        updated_S = self.optimizer.step(
            grads,
            lr_S,
            _stacked([result.metrics["loss"] for result in results]),
            members,
            skip_S=self._skips(trainers, results),
            row_norms={name: [result.row_norms[name] for result in results] for name in known},
        )
        for trainer, updated in zip(trainers, updated_S, strict=True):
            if trainer.sae.renormalize_(updated):
                self.optimizer.refresh_copies(self.index[trainer.name])
        of_batches = {id(x_BD): x_BD for x_BD in (batches[trainer.name] for trainer in trainers)}
        finite = {i: torch.linalg.vector_norm(x_BD, torch.inf) < torch.inf for i, x_BD in of_batches.items()}
        side_by_side(
            [
                partial(self._finish, trainer, result, updated, finite[id(batches[trainer.name])])
                for trainer, result, updated in zip(trainers, results, updated_S, strict=True)
            ],
            self._branches(batches),
        )

    def _skips(self, trainers: Sequence[SAETrainer], results: Sequence[StepResult]) -> Tensor | None:
        """Return whose updates are skipped whatever their numbers are, bool [S]; None where nothing says
        so."""
        found = [trainer.skips(result) for trainer, result in zip(trainers, results, strict=True)]
        skips = [skip for skip in found if skip is not None]
        if 0 < len(skips) < len(found):  # some have lists of fixed length
            skips = [torch.zeros_like(skips[0]) if skip is None else skip for skip in found]
        return _stacked(skips) if skips else None

    def _finish(
        self, trainer: SAETrainer, result: StepResult, updated: Tensor, batch_is_finite: Tensor
    ) -> None:
        """Keep an SAE's metrics and update what is not a parameter."""
        self._keep_metrics(trainer.name, result.metrics)
        trainer.update_state(result, updated, batch_is_finite)

    def _forward(self, members: slice, batches: Mapping[str, Tensor], step: int) -> list[StepResult]:
        """Run the forward and backward passes of some of the SAEs."""
        bf16_copies = self.optimizer.bf16_copies
        passes = [
            partial(
                trainer.forward,
                batches[trainer.name],
                step,
                self.scales_2S[1, s],
                {name: copy_S[s] for name, copy_S in bf16_copies.items()},
            )
            for s, trainer in list(enumerate(self.trainers))[members]
        ]
        return side_by_side(passes, self._branches(batches))

    def _branches(self, batches: Mapping[str, Tensor]) -> int:
        return branches(len(next(iter(batches.values()))), self.trainers[0].sae.d_sae)

    def _keep_metrics(self, name: str, metrics: Mapping[str, Tensor]) -> None:
        """Copy an SAE's metrics of this step to `last`.

        They lie outside the graphs' memory, which all graphs of the process share: another group's step would
        overwrite them before they are read.
        """
        if self._metrics_SN is None:  # in the first step, which is never captured
            self._metrics_SN = torch.zeros(len(self.trainers), len(metrics), device=self.device)
        row_N = self._metrics_SN[self.index[name]]
        torch.stack([value.float() for value in metrics.values()], out=row_N)
        if name not in self.last:
            self.last[name] = dict(zip(metrics, row_N.unbind(), strict=True))

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Return everything that the next step of one SAE depends on."""
        s = self.index[name]
        optimizer = {f"optimizer.{key}": tensor for key, tensor in self.optimizer.state_dict(s).items()}
        return self.trainers[s].state_dict() | optimizer

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned for an equal SAE, in this or an earlier version."""
        s, state = self.index[name], current_names(state)
        self.trainers[s].load_state_dict(state)
        self.optimizer.load_state_dict(
            s, {key.removeprefix("optimizer."): tensor for key, tensor in state.items()}
        )


def _stacked(scalars: Sequence[Tensor]) -> Tensor:
    """Stack scalars; one alone is not copied."""
    return scalars[0][None] if len(scalars) == 1 else torch.stack(list(scalars))


def group_trainers(trainers: Iterable[SAETrainer]) -> list[TrainerGroup]:
    """Group trainers that can share arrays, as many in a group as gradients may be held of at once.

    On a CPU each stays alone: sharing gains nothing there, and where an array begins may show in the last bit
    of torch's sums.
    """
    by_key: dict[tuple[Any, ...], list[SAETrainer]] = {}
    for trainer in trainers:
        by_key.setdefault(TrainerGroup.key(trainer), []).append(trainer)
    groups = []
    for alike in by_key.values():
        sae = alike[0].sae
        bytes_of_one = sum(p.numel() * p.element_size() for p in sae.parameters())
        together = sae.W_enc.is_cuda and sae.shards is None
        size = max(GRADIENTS_AT_ONCE // bytes_of_one, 1) if together else 1
        groups += [TrainerGroup(alike[i : i + size]) for i in range(0, len(alike), size)]
    return groups
