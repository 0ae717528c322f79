"""The fast step is the plain meaning's maths: from each state of real runs, over whole runs, in bfloat16, in
company, in both layouts.

B tokens, D d_in, F d_sae.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks import same_maths
from benchmarks.alone import LoneTrainer
from benchmarks.same_maths import SETTINGS, Data, weights
from monosemy import ops
from monosemy.codes import Execution
from monosemy.ops import cpu, reference
from monosemy.schedule import Schedule
from monosemy.training import trainer
from monosemy.training.group import TrainerGroup
from monosemy.training.sweep import Sweep
from monosemy.training.trainer import READBACK_EVERY, SPARSE_BELOW, SAESpec, SAETrainer
from tests import synthetic

FAST = "cpu" if cpu.available() else "aten"
RELU = ("standard", "standard_new", "gated", "p_anneal", "jump_relu", "jump_relu_tanh")
every = pytest.mark.parametrize("name", sorted(SETTINGS))
relu = pytest.mark.parametrize("name", RELU)


@pytest.fixture(scope="module")
def small() -> Data:
    return same_maths.data(24, 32)


@pytest.fixture(scope="module")
def large() -> Data:
    return same_maths.data(same_maths.FREE_STEPS, 256, whole=True)


# --- from the same state


def check_states(name: str, batches: list[Tensor], d_sae: int, form: str, every: int) -> None:
    """Losses within 1e-6, gradients within 1e-5 of their largest value, and the same latents but for
    near-ties.

    Where another latent of a near-tie was taken losses do differ: there the fast form is held to float64,
    which chooses for itself. Where gradients have all but canceled, float32 itself loses more than 1e-5:
    there the fast form may be at most three times as far from float64 as the plain meaning is.
    """
    apart = list(same_maths.from_each_state(name, batches, d_sae, form, every=every))
    assert all((a.loss_error if a.flips else a.loss) <= 1e-6 for a in apart)
    assert all(a.flips == a.ties for a in apart)
    assert all(a.weights <= 1e-6 for a in apart)
    assert max(a.fast_error for a in apart) <= max(1e-5, 3 * max(a.plain_error for a in apart if not a.flips))
    assert {a.sparse for a in apart} == ({True} if name.endswith("top_k") else {False, True})
    assert name in ("gated", "batch_top_k") or any(a.dead for a in apart), (
        "AuxK and counters of dead latents are at work"
    )


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A form of the ops; "estimated" is the compiled one where it estimates the encoder's product however
    many latents are active."""
    if request.param == "estimated":
        monkeypatch.setattr(trainer, "ESTIMATE_BELOW", 2.0)
        return "cpu"
    return str(request.param)


fast_forms = pytest.mark.parametrize("form", [FAST] + ["estimated"] * (FAST == "cpu"), indirect=True)
all_forms = pytest.mark.parametrize(
    "form", sorted({FAST, "aten"}) + ["estimated"] * (FAST == "cpu"), indirect=True
)


@fast_forms
@every
def test_a_step_from_each_state(small: Data, name: str, form: str) -> None:
    check_states(name, small.batches, 256, form, every=20)


@pytest.mark.certify
@all_forms
@every
def test_a_step_from_every_state(large: Data, name: str, form: str) -> None:
    check_states(name, large.batches, 512, form, every=1)


@pytest.mark.parametrize("constraint", ["free", "project"])
@pytest.mark.parametrize("form", sorted({FAST, "aten"}), indirect=True)
def test_the_norm_that_clips_is_exact_at_a_real_width(form: str, constraint: ops.Constraint) -> None:
    draw = torch.Generator().manual_seed(0)
    p, g = (torch.randn(1, 4096, 576, generator=draw) for _ in range(2))
    p = torch.nn.functional.normalize(p, dim=2)
    with ops.use_backend(form):
        got = ops.backends.backend_for(p).square_norms(p, list(g), constraint)
    assert float(got) == pytest.approx(
        float(reference.square_norms(p.double(), list(g.double()), constraint)), rel=1e-6
    )


# --- running free


def check_drift(
    name: str, batches: list[Tensor], d_sae: int, form: str, steps: int, seeds: tuple[int, ...]
) -> None:
    """Fast runs leave the plain one by at most three times as much as the plain one leaves itself, once moved
    by units in the last place."""
    found = same_maths.drift(name, batches, d_sae, form, steps, seeds)
    assert 0 < found.weights <= 3 * found.nudged_weights
    assert found.losses <= 3 * found.nudged_losses


@every
def test_runs_stay_together(small: Data, name: str) -> None:
    # where two values lie within rounding of each other, some nudged runs take the other path
    check_drift(name, small.batches, 64, FAST, 40, (0, 1, 2))


@pytest.mark.certify
@all_forms
@every
def test_whole_runs_stay_together(large: Data, name: str, form: str) -> None:
    check_drift(name, [x[:128] for x in large.batches], 256, form, same_maths.FREE_STEPS, (0, 1, 2))


# --- bfloat16


@pytest.fixture
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates by bfloat16 products, where integers are faster, too."""
    monkeypatch.setattr(cpu, "cpu_estimates_in_bf16", lambda: True)


@pytest.mark.usefixtures("bf16_products")
def test_bf16_is_within_the_seeds_of_float32(small: Data) -> None:
    found = same_maths.evaluated("top_k", small, 64, splice=False, bf16=(0,))
    spread, difference = same_maths.spread(found, "fvu")
    assert 0 < difference <= spread


@pytest.mark.certify
@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("name", ["top_k", "batch_top_k", "standard", "gated", "jump_relu"])
def test_bf16_trains_as_well_as_float32(large: Data, name: str) -> None:
    """What bfloat16 changes of any of three seeds is no more than the largest minus the smallest of those
    seeds in float32."""
    found = same_maths.evaluated(name, large, 256, splice=True)
    for key in ("fvu", "loss_recovered_zero"):
        spread, difference = same_maths.spread(found, key)
        assert 0 < difference <= spread, key


@pytest.mark.usefixtures("bf16_products")
@every
def test_how_the_product_is_estimated_changes_no_bit(name: str) -> None:
    """Selections look up what any estimate leaves open, so that after it a run in bfloat16 is that of
    float32."""
    runs = []
    for bf16 in (False, True):
        m = begun(name, (96, 48, 512), sparse=True, bf16=bf16)
        m.use_estimate = True
        for step, x_BD in enumerate(batches(96, 48)):
            m.step(x_BD, step)
        estimated = isinstance(m.sae.preactivations(x_BD, Execution(use_estimate=True)).product, ops.Estimate)
        runs.append((weights(m), m.last["loss"]))
    assert not estimated or all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- the same bits


def batches(B: int, D: int, n: int = 8) -> Tensor:
    return torch.stack([synthetic.batch(step, B, D) for step in range(n)])


def begun(
    name: str,
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    sparse: bool = False,
    tag: str = "",
    kind: type = LoneTrainer,
    **how: object,
) -> SAETrainer:
    B, D, F = shape
    settings = SETTINGS[name] | ({"k": 4} if "k" in SETTINGS[name] else {})
    plan = Schedule.of_run(60, B, dead_feature_threshold=4 * B)
    m = kind(
        tag or name,
        SAESpec(name, F, lr=3e-3, seed=seed, settings=settings),
        D,
        plan,
        **({"workspace": ops.Workspace()} | how),
    )
    m.sparse |= sparse
    return m


def trained(name: str, shape: tuple[int, int, int], steps: int = 60, **how: object) -> LoneTrainer:
    m, of = begun(name, shape, **how), batches(*shape[:2])
    for step in range(steps):
        m.step(of[step % len(of)], step)
    return m


def equal(a: LoneTrainer, b: LoneTrainer) -> bool:
    return equal_states(a.save(), b.save())


def equal_states(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(t.nan_to_num(nan=-7), theirs[n].nan_to_num(nan=-7)) for n, t in ours.items()
    )


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every
def test_two_runs_are_one(name: str) -> None:
    assert equal(trained(name, (60, 13, 41), 24), trained(name, (60, 13, 41), 24))


@pytest.mark.skipif(FAST != "cpu", reason="only the compiled ops promise it")
@pytest.mark.parametrize(
    ("name", "sparse"), [*((n, True) for n in sorted(SETTINGS)), *((n, False) for n in RELU)]
)
def test_bits_do_not_follow_the_threads(threads: None, name: str, sparse: bool) -> None:
    """The compiled ops promise it.

    Of torch's own, the encoder's product and those of the dense layout were found to keep it.
    """
    ends = []
    for n in (1, 2):
        torch.set_num_threads(n)
        # more numbers than torch sums in one thread
        ends.append(trained(name, (256, 24, 512), 24 if name == "p_anneal" else 12, sparse=sparse))
    assert equal(*ends)


@pytest.mark.parametrize("form", sorted({FAST, "aten"}))
def test_company_and_logging_change_no_bit(form: str) -> None:
    """Each SAE alone, never logged, and in a sweep of all architectures, each twice, logged at every step; no
    size is round."""
    shape, scratch, steps = (60, 13, 41), ops.Workspace(), iter(range(60))
    of = batches(*shape[:2])
    with ops.use_backend(form):
        crowd = [
            begun(name, shape, seed=seed, tag=f"{name} {seed}", kind=SAETrainer, workspace=scratch)
            for name in SETTINGS
            for seed in (1, 0)
        ]
        sweep = Sweep({"": crowd})
        sweep.run(lambda: {"": of[next(steps) % len(of)]}, 60, log_steps=1)
        for m in crowd[1::2]:
            assert equal_states(sweep.state_dict()[m.name], trained(m.sae.name, shape).save()), m.sae.name


@pytest.mark.skipif(FAST != "cpu", reason="only the compiled ops promise it")
@every
def test_company_in_one_array_changes_no_bit(name: str) -> None:
    """As a GPU has them: SAEs of one shape as parts of the same arrays."""
    shape = (60, 13, 41)
    pair, of = (
        [begun(name, shape, seed=seed, tag=f"{name} {seed}", kind=SAETrainer) for seed in (1, 0)],
        batches(*shape[:2]),
    )
    group = TrainerGroup(pair)
    for step in range(60):
        group.step({m.name: of[step % len(of)] for m in pair}, step)
    assert equal_states(group.state_dict(pair[1].name), trained(name, shape).save())


@pytest.mark.certify
@every
def test_bits_of_one_and_two_threads_at_a_real_width(threads: None, large: Data, name: str) -> None:
    ends = []
    for n in (1, 2):
        torch.set_num_threads(n)
        m = same_maths.member(name, 4096, large.batches, 10, dead=2)
        for step in range(10):
            m.step(large.batches[step], step)
        ends.append(m)
    assert equal(*ends)


# --- the layout


def falling(name: str, falls: int, rises: int = 10**6, lr: float = 0.0) -> Iterator[tuple[int, LoneTrainer]]:
    """A run whose L0 is small from one step on until another, by its encoder's biases: (step, member after
    it)."""
    B, D, F = 32, 16, 64
    m, of = (
        LoneTrainer(name, SAESpec(name, F, lr=lr, settings=SETTINGS[name]), D, Schedule.of_run(1000, B)),
        batches(B, D),
    )
    usual = m.sae.b_enc.detach().clone()
    for step in range(10**6):
        if step in (falls, rises):
            m.sae.b_enc.data.copy_(usual - (0.6 if step == falls else 0.0))
        m.step(of[step % len(of)], step)
        yield step, m


@pytest.mark.parametrize(
    ("falls", "rises", "changes"),
    [
        (0, 10**6, [100]),
        (1, 10**6, [200]),
        (100, 10**6, [200]),
        (101, 10**6, [300]),
        (50, 250, [200, 400]),
        (50, 200, [200, 300]),
        (101, 200, []),
    ],
)
def test_the_layout_changes_a_hundred_steps_after_the_count(
    falls: int, rises: int, changes: list[int]
) -> None:
    limit, layouts = SPARSE_BELOW["cpu"] * 64, []
    for step, m in falling("standard", falls, rises):
        assert (float(m.active) < limit) == (falls <= step < rises), "L0 is what the test says"
        layouts.append(m.sparse)
        if step == 400:
            break
    assert [step for step in range(1, 401) if layouts[step] != layouts[step - 1]] == changes
    assert all(step % READBACK_EVERY == 0 for step in changes)


@pytest.mark.parametrize(
    ("name", "at"), [("standard", 101), ("standard", 199), *((name, 150) for name in RELU)]
)
def test_a_restored_run_changes_its_layout_at_the_same_step(name: str, at: int) -> None:
    """Stopped before a step between the count and the change, written out, and gone on with."""
    of, again = batches(32, 16), None
    for step, m in falling(name, 60, lr=1e-3):
        if again is not None:
            again.step(of[step % len(of)], step)
            assert again.sparse == m.sparse == (step >= 200)
            assert equal(again, m)
        if step == at - 1:
            file = io.BytesIO()
            torch.save(m.save(), file)
            file.seek(0)
            again = LoneTrainer(name, m.spec, 16, m.schedule)
            again.resume(torch.load(file))
        if step == 205:
            break


@relu
def test_the_change_of_layout_shows_in_no_loss(small: Data, name: str) -> None:
    """A run on real activations: its layout is what was counted a hundred steps before, and at its change
    both give the same loss."""
    m = same_maths.member(name, 256, small.batches, same_maths.STEPS)
    counted, changes = {}, []
    for step in range(202):
        x_BD, before = small.batches[step % len(small.batches)], m.sparse
        state = {n: t.clone() for n, t in m.save().items()}
        m.step(x_BD, step)
        counted[step] = float(m.active)
        assert m.sparse == (step >= 100 and counted[step // 100 * 100 - 100] < SPARSE_BELOW["cpu"] * 256)
        if m.sparse != before:
            other = same_maths.member(name, 256, small.batches, same_maths.STEPS)
            other.resume(state)
            other.readback = None  # so that it stays as it was
            other.step(x_BD, step)
            assert other.sparse == before
            assert float(m.last["loss"]) == pytest.approx(float(other.last["loss"]), rel=1e-6)
            assert same_maths.distance(weights(m), weights(other)) <= 1e-6
            changes.append(step)
    assert changes == [200]


def test_on_a_cpu_a_rise_of_l0_costs_no_update() -> None:
    """The sparse layout trains on whatever is active there, as the dense one does."""
    for step, m in falling("standard", 0, 150):
        refused, *_, passed = m.nonfinite.tolist()
        assert refused == passed == 0
        if step == 160:
            break
