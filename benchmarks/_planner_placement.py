"""Our plans trained beside others of the same memory, on jobs that a seed drew: tables of uneven size, skew and lookups.

For each job:

    profile   of batches that are not trained; ``dense_ms`` is the model's step without tables; the machine's calibration
    memory    what pools of one share of every table's rows take, indices and the ids of batches that wait included: drawn, 10 to 40%
    ours      ``TieredShardingPlanner`` with so much memory, the plan as it comes
    equal     every table above the SSD, with that share of its rows in the pool
    greedy    TorchRec's planner, with its GreedyProposers and partitioner, over our options: tables in memory, and above the SSD with
              any pool of the search's grid, perf and storage from our estimators
    uniform   the same with the UniformProposer, which has but one option a table to propose: those above the SSD with
              one step of the grid for all tables, the largest with which it finds a plan

All train the same batches with the real kernel and volume, in turns, after their pools were filled, as they are in a job that goes on, with
the most used rows of the profile, and after ``warm`` batches; the step is the median of the rounds' means, a ratio the median of the
rounds' ratios. Plans that these do not tell from ours are trained for more rounds, with ours, ``looks`` times at most; the sign test of
each look is so much stricter that all together err in 1 of 20 cases. A plan that is ours is said to be, and has no ratio. Rows are put
into all homes in turns, so that none lies there longer than another. Where a plan has every table in memory, it
trains as stock TorchRec does, without a pipeline, and no ids of batches wait.

Where all fits in memory, our planner and sharders are held against TorchRec's; both train in the plain loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.types import PlannerError, ShardingOption
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingPlan
from torchrec_mtrains.planner import (
    AccessProfile,
    CheckpointSchedule,
    DdrStorageReservation,
    HardwareProfile,
    TieredShardingPlanner,
    TieredTopology,
)
from torchrec_mtrains.planner.candidates import POOLS
from torchrec_mtrains.planner.enumerators import TieredEnumerator
from torchrec_mtrains.planner.estimators import beside_tiers, charged
from torchrec_mtrains.planner.perf_model import PerfModel
from torchrec_mtrains.planner.sharding_options import TieredShardingOption

import torchrec_mtrains as mtrains
from _common import Figure, median
from _device_reads import as_read, calibrated_reads, read_in_place
from _planner_jobs import PREFETCHED, Job, JobTable, MixedBatches, predicted_by
from _train_sides import DENSE_FEATURES, Side, plan_of, put_every_row
from torchrec_mtrains.job_model import build_model, fused_params, stock_sharders
from torchrec_mtrains.process_group import process_group
from torchrec_mtrains.tiers import SsdHome

SEED = 6
OTHERS = ("equal", "greedy", "uniform")
NO_CHECKPOINTS = CheckpointSchedule(keep=0)
_PLENTY = 1 << 40
_IN_MEMORY_ROUNDS = 2
_READ_AHEAD = 80  # batches that a pipeline may ask for beyond those that it trains


@dataclass(frozen=True)
class Case:
    """``memory_share``: of every table's rows, whose pools take the memory that all plans have."""

    job: Job
    memory_share: float
    width: int

    @property
    def name(self) -> str:
        rows = sum(t.rows for t in self.job.tables)
        return (
            f"{len(self.job.tables)} tables, {rows / 1e3:,.0f}K rows × {self.job.dim}, batch {self.job.batch_size}, "
            f"{self.memory_share:.0%}, top {self.width}"
        )


@dataclass(frozen=True)
class Size:
    """``rows``: the least and most of a table. ``warm``: batches before the rounds of ``steps`` steps; the first ``uncounted``
    of each round are left out. ``rounds``: of each look, of ``looks`` at most."""

    cases: int
    cases_in_memory: int
    rows: tuple[int, int]
    dims: tuple[int, ...]
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    profiled: int
    warm: int
    rounds: int
    looks: int
    uncounted: int
    steps: int

    @property
    def look(self) -> int:
        """Batches of the rounds of a look."""
        return self.rounds * (self.uncounted + self.steps)

    @property
    def trained(self) -> int:
        """Batches that a side trains at most."""
        return self.warm + self.looks * self.look


FULL = Size(
    cases=12, cases_in_memory=3, rows=(20_000, 300_000), dims=(32, 64, 128), batches=(256, 512, 1024), widths=(16, 64, 256),
    profiled=120, warm=70, rounds=15, looks=3, uncounted=4, steps=8,
)  # fmt: skip
QUICK = Size(
    cases=1, cases_in_memory=1, rows=(10_000, 40_000), dims=(16,), batches=(32,), widths=(16,), profiled=30, warm=6, rounds=1,
    looks=2, uncounted=2, steps=3,
)  # fmt: skip


def drawn(size: Size, seed: int = SEED) -> list[Case]:
    """Jobs of 4 to 8 tables; rows and pooling log-uniform, exponents and memory uniform."""
    rng = np.random.default_rng(seed)
    cases = []
    for _ in range(size.cases):
        tables = tuple(
            JobTable(
                round(math.exp(rng.uniform(*np.log(size.rows)))),
                round(rng.uniform(0.3, 1.3), 2),
                round(math.exp(rng.uniform(0, math.log(10)))),
            )
            for _ in range(rng.integers(4, 9))
        )
        job = Job(tables, int(rng.choice(size.dims)), int(rng.choice(size.batches)))
        cases.append(Case(job, round(rng.uniform(0.1, 0.4), 2), int(rng.choice(size.widths))))
    return cases


class _Sized(TieredEnumerator):
    """The options in memory, and those above the SSD once for each step of the grid of pools; ``only``: just those with that step.
    ``waiting``: ids of batches wait for the tables in memory too."""

    only: int | None = None
    waiting = True

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        found: list[ShardingOption] = []
        for option in super().enumerate(module, sharders):
            if isinstance(option, TieredShardingOption):
                sizes = np.rint(np.geomspace(option.min_pool_rows, option.shard_rows, POOLS)).astype(int)
                found += [option.resized(int(pool)) for pool in (sizes if self.only is None else sizes[[self.only]])]
            elif self.only is None:
                found.append(beside_tiers(option) if self.waiting else charged(option))
        return found


@dataclass(frozen=True)
class _Planned:
    """``pools``: rows by table, None for one that is in memory."""

    plan: ShardingPlan
    pools: Mapping[str, int | None]
    options: Sequence[ShardingOption]


class _Plans:
    """All plans of a case."""

    def __init__(self, case: Case, hardware: HardwareProfile, access: AccessProfile, dense_ms: float) -> None:
        self._case, self._hardware, self._access, self._dense_ms = case, hardware, access, dense_ms
        self._model = PerfModel(hardware, dense_ms=dense_ms, checkpoints=NO_CHECKPOINTS)
        enumerator = self._enumerator(self._topology(_PLENTY), _Sized)
        options = enumerator.enumerate(self._module, self._sharders)
        self._tiered = {o.name: o for o in options if isinstance(o, TieredShardingOption)}
        self._equal = {
            name: max(o.min_pool_rows, min(o.shard_rows, round(case.memory_share * o.shard_rows))) for name, o in self._tiered.items()
        }
        self._waiting_bytes = enumerator.waiting_ids.of_rank
        self.ddr_bytes = sum(o.ddr_bytes(0, self._equal[name]) for name, o in self._tiered.items()) + self._waiting_bytes

    @property
    def _module(self) -> nn.Module:
        return build_model(self._case.job.shape.tables, DENSE_FEATURES, self._case.job.shape.model_options)

    @property
    def _sharders(self) -> list[ModuleSharder[nn.Module]]:
        return list(mtrains.sharders(fused_params(self._case.job.shape.model_options)))

    def _home(self, folder: Path | str) -> SsdHome:
        return SsdHome((str(folder),), capacity_bytes=2 * self._case.job.bytes + (512 << 20))

    def _topology(self, ddr_bytes: int, folder: Path | str = "ssd") -> TieredTopology:
        return TieredTopology(1, ddr_budget_bytes=ddr_bytes, ssd=self._home(folder))

    def _enumerator(self, topology: TieredTopology, kind: type[_Sized]) -> _Sized:
        return kind(topology, self._case.job.batch_size, None, self._model, self._access)

    def ours(self, folder: Path, ddr_bytes: int | None = None) -> _Planned:
        planner = TieredShardingPlanner(
            self._topology(ddr_bytes or self.ddr_bytes, folder),
            batch_size=self._case.job.batch_size,
            hardware=self._hardware,
            access=self._access,
            dense_ms=self._dense_ms,
            checkpoints=NO_CHECKPOINTS,
            stats=[],
        )
        plan = planner.plan(self._module, self._sharders)
        pools = {row["table"]: row["pool_rows"] for row in planner.plan_rows(plan)}
        assert planner._best_plan is not None
        return _Planned(plan, pools, planner._best_plan)

    def equal(self, folder: Path) -> _Planned:
        return self._planned([self._tiered[name].resized(pool) for name, pool in self._equal.items()], folder)

    def greedy(self, folder: Path) -> _Planned:
        proposers = [GreedyProposer(), GreedyProposer(use_depth=False)]
        options = self._stock(None, proposers, waiting=False)
        if any(isinstance(o, TieredShardingOption) for o in options):
            options = self._stock(None, proposers)
        return self._planned(options, folder)

    def uniform(self, folder: Path) -> _Planned:
        for step in reversed(range(POOLS)):
            try:
                return self._planned(self._stock(step, [UniformProposer()]), folder)
            except PlannerError:
                pass
        raise AssertionError("the smallest pools of all tables fit, as those of equal shares do")

    def in_memory(self) -> ShardingPlan:
        """TorchRec's own."""
        topology = Topology(world_size=1, compute_device="cpu", ddr_cap=_PLENTY)
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=self._case.job.batch_size, stats=[])
        return planner.plan(self._module, stock_sharders(self._case.job.shape.model_options))

    def _stock(self, step: int | None, proposers: list[Any], *, waiting: bool = True) -> list[ShardingOption]:
        """``waiting``: memory is kept for ids of batches that wait, as it is in every plan with tiers."""
        topology = self._topology(self.ddr_bytes)
        enumerator = self._enumerator(topology, _Sized)
        enumerator.only, enumerator.waiting = step, waiting
        planner = EmbeddingShardingPlanner(
            topology=topology,
            batch_size=self._case.job.batch_size,
            enumerator=enumerator,
            storage_reservation=DdrStorageReservation(self._waiting_bytes if waiting else 0),
            proposer=proposers,
            partitioner=GreedyPerfPartitioner(),
            stats=[],
        )
        planner.plan(self._module, self._sharders)
        assert planner._best_plan is not None
        return planner._best_plan

    def _planned(self, options: Sequence[ShardingOption], folder: Path) -> _Planned:
        for option in options:
            option.shards[0].rank = 0
        pools = {o.name: o.pool_rows if isinstance(o, TieredShardingOption) else None for o in options}
        return _Planned(self._plan(pools, folder), pools, options)

    def step_ms(self, planned: _Planned, hardware: HardwareProfile) -> float:
        """By our model, on such a machine."""
        return predicted_by(replace(self._model, hardware=hardware), planned.options).step_ms

    def _plan(self, pools: Mapping[str, int | None], folder: Path) -> ShardingPlan:
        home, names = self._home(folder), [t.name for t in self._case.job.shape.tables]

        def sharding(table: int, where: dict[str, Any]) -> ParameterSharding:
            pool = pools[names[table]]
            if pool is None:
                return ParameterSharding(**where, compute_kernel="fused")
            return mtrains.TieredParameterSharding(**where, tiers=mtrains.TierChain(pool, (home,)))

        return plan_of(self._case.job.shape, sharding)


def _side(name: str, case: Case, planned: _Planned) -> Side:
    """A model under a plan."""
    shape = case.job.shape
    tiered = any(pool is not None for pool in planned.pools.values())
    sharders = list(mtrains.sharders(fused_params(shape.model_options)))
    return Side(name, shape, {"top": case.width}, planned.plan, sharders, PREFETCHED if tiered else 0, None)


def _fill(sides: Sequence[Side], most_used: Mapping[str, np.ndarray]) -> None:
    """Homes, and pools with these rows, of which the last are used most."""
    put_every_row(*sides)
    for side in sides:
        for group in side.groups:
            for i, table in enumerate(group.tables):
                group.warm(i, most_used[table.name])


def _in_turns(sides: Sequence[Side], batches: MixedBatches, size: Size, same: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Milliseconds a step of each side, and what its pools missed. The first look is of all sides, further ones are of the first side
    and of those that are not told from it yet; ``same``: sides that need not be."""
    first = sides[0].name
    batches.make(0, size.warm + size.look + _READ_AHEAD)
    for side in sides:
        side.run(batches, "top", 0, size.warm)
    rounds: dict[str, list[float]] = {side.name: [] for side in sides}
    misses: dict[str, list[float]] = {side.name: [] for side in sides}
    turns = list(sides)
    for look in range(size.looks):
        batches.make(size.warm + look * size.look, size.warm + (look + 1) * size.look + _READ_AHEAD)
        for r in range(size.rounds):
            for side in turns[r % len(turns) :] + turns[: r % len(turns)]:
                done = side.run(batches, "top", size.steps, size.uncounted)
                rounds[side.name].append(1e3 * sum(done.seconds) / size.steps)
                misses[side.name].append(done.counters.get("misses", 0) / size.steps)
        unclear = [s for s in turns if s.name not in (first, *same) and not told_apart(ratios(rounds[first], rounds[s.name]), size.looks)]
        if not unclear:
            break
        turns = [sides[0], *unclear]
    return {
        name: {"step_ms": median(of_side), "rounds_ms": of_side, "misses": sum(misses[name]) / len(misses[name])}
        for name, of_side in rounds.items()
    }


def _of_case(number: int, case: Case, size: Size, hardware: HardwareProfile, root: Path) -> dict[str, Any]:
    seen = case.job.traces(size.profiled, stream=1)
    access = case.job.profile(seen)
    batches = MixedBatches(case.job.shape, case.job.traces(size.trained + _READ_AHEAD))
    batches.make(0, 1)
    dense_ms = case.job.dense_ms(case.width, batches.made[0], 12)
    plans = _Plans(case, hardware, access, dense_ms)
    makers = {"ours": plans.ours, "equal": plans.equal, "greedy": plans.greedy, "uniform": plans.uniform}
    planned, sides = {}, []
    names = list(makers)
    for name in names[number % len(names) :] + names[: number % len(names)]:
        (root / name).mkdir()
        planned[name] = makers[name](root / name)
        sides.append(_side(name, case, planned[name]))
    _fill(sides, {trace.name: _by_use(trace.ids, trace.rows) for trace in seen})
    before = read_in_place(root / "equal")
    in_place = as_read(hardware, before.reads_per_s)
    same = [name for name in makers if name != "ours" and planned[name].pools == planned["ours"].pools]
    sides.sort(key=lambda side: side.name != "ours")
    measured = _in_turns(sides, batches, size, same)
    after = read_in_place(root / "equal")
    for side in sides:
        side.close()
    line: dict[str, Any] = {"case": case.name, "ddr_bytes": plans.ddr_bytes, "dense_ms": dense_ms, "looks": size.looks, "same": same}
    line["device"] = {"calibrated": calibrated_reads(hardware), "before": asdict(before), "after": asdict(after)}
    line["tables"] = [{"rows": t.rows, "exponent": t.exponent, "pooling": t.pooling} for t in case.job.tables]
    line["plans"] = {
        name: measured[name]
        | {"predicted_ms": plans.step_ms(planned[name], in_place), "as_calibrated_ms": plans.step_ms(planned[name], hardware)}
        | {"pools": dict(planned[name].pools)}
        for name in makers
    }
    return line


def _by_use(ids: np.ndarray, rows: int) -> np.ndarray:
    """All rows, the least used first."""
    return np.asarray(np.argsort(np.bincount(ids.reshape(-1), minlength=rows), kind="stable"))


def _in_memory(case: Case, size: Size, hardware: HardwareProfile, root: Path) -> dict[str, Any]:
    """Our plan with memory for everything, against TorchRec's; more rounds, as the difference is small if there is one."""
    size = replace(size, rounds=_IN_MEMORY_ROUNDS * size.rounds, looks=1)
    batches = MixedBatches(case.job.shape, case.job.traces(size.trained + _READ_AHEAD))
    access = case.job.profile(case.job.traces(size.profiled, stream=1))
    plans = _Plans(case, hardware, access, 0.0)
    options, widths = case.job.shape.model_options, {"top": case.width}
    planned = plans.ours(root, _PLENTY)
    ours = Side("ours", case.job.shape, widths, planned.plan, list(mtrains.sharders(fused_params(options))), 0, None)
    stock = Side("stock", case.job.shape, widths, plans.in_memory(), list(stock_sharders(options)), 0, None)
    measured = _in_turns([ours, stock], batches, size)
    ours.close()
    return {"case": case.name, "plans": measured}


def measure(root: Path, hardware: HardwareProfile, size: Size, cases: Sequence[int] | None = None) -> dict[str, Any]:
    """``root``: a folder on the disk. ``cases``: some of them by number; None: all."""
    every = drawn(size)
    lines, in_memory = [], []
    print(f"4 KiB reads a second by the calibration, which plans are made with: {calibrated_reads(hardware):,.0f}")
    heads = "".join(f"{'÷ ' + name:>20}" for name in OTHERS)
    print(f"{'':<66}{'ours, ms':>14}{heads}   (predicted, of the device in place); reads/s before and after")
    with process_group():
        for number in range(size.cases) if cases is None else cases:
            folder = root / f"case{number}"
            folder.mkdir()
            lines.append({"number": number, **_of_case(number, every[number], size, hardware, folder)})
            print(_line(lines[-1]), flush=True)
        for number in range(size.cases_in_memory):
            folder = root / f"memory{number}"
            folder.mkdir()
            in_memory.append(_in_memory(every[number], size, hardware, folder))
            step = {name: of["step_ms"] for name, of in in_memory[-1]["plans"].items()}
            print(f"{in_memory[-1]['case']}, all in memory: ours {step['ours']:.2f} ms, stock {step['stock']:.2f}", flush=True)
    return {"seed": SEED, "lines": lines, "in_memory": in_memory}


def _line(line: dict[str, Any]) -> str:
    ours, device = line["plans"]["ours"], line["device"]
    cells = [f"{ours['step_ms']:.2f} ({ours['predicted_ms']:.2f})"]
    for other in OTHERS:
        theirs, rounds = line["plans"][other], _of_rounds(line, other)
        unclear = "" if told_apart(rounds, line["looks"]) else "≈"
        figure = f"{median(rounds):.2f}{unclear} ({ours['predicted_ms'] / theirs['predicted_ms']:.2f}), {len(rounds)}"
        cells.append("same plan" if other in line["same"] else figure)
    reads = ", ".join(f"{device[when]['reads_per_s']:,.0f}" for when in ("before", "after"))
    return f"{line['number']:>3} {line['case']:<62}{cells[0]:>14}" + "".join(f"{cell:>20}" for cell in cells[1:]) + f"   {reads}"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round, of those that both have, the least first."""
    return sorted(a / b for a, b in zip(ours, theirs, strict=False))


def _of_rounds(line: dict[str, Any], other: str) -> list[float]:
    """Our step ÷ the other plan's, round by round, the least first."""
    return ratios(line["plans"]["ours"]["rounds_ms"], line["plans"][other]["rounds_ms"])


def told_apart(of_rounds: Sequence[float], looks: int = 1) -> bool:
    """Whether 1 is outside the middle rounds, among which their median lies (sign test): of so many looks all together err in 1 of 20."""
    outside = round(binom.ppf(0.025 / looks, len(of_rounds), 0.5)) - 1
    return outside >= 0 and (of_rounds[-1 - outside] < 1 or of_rounds[outside] > 1)


def figures(found: dict[str, Any]) -> list[Figure]:
    """Of cases in which both plans are the same there is no ratio."""
    made = [Figure("placement: skewed cases", len(found["lines"]), "≥ 10", digits=0)]
    for other in OTHERS:
        others = [line for line in found["lines"] if other not in line["same"]]
        rounds = [_of_rounds(line, other) for line in others]
        measured = [median(of_line) for of_line in rounds]
        predicted = [line["plans"]["ours"]["predicted_ms"] / line["plans"][other]["predicted_ms"] for line in others]
        made.append(Figure(f"placement: cases in which {other} has our plan", len(found["lines"]) - len(others), digits=0))
        made.append(
            Figure(
                f"placement: cases whose rounds do not tell ours from {other}",
                sum(not told_apart(r, line["looks"]) for r, line in zip(rounds, others, strict=True)),
                digits=0,
            )
        )
        if others:
            made.append(Figure(f"placement: our step ÷ {other}, median", median(measured), digits=3))
            made.append(Figure(f"placement: our step ÷ {other}, worst", max(measured), "< 1", digits=3))
            made.append(Figure(f"placement: our step ÷ {other}, predicted, worst", max(predicted), digits=3))
    in_memory = [median(_of_rounds(line, "stock")) for line in found["in_memory"]]
    made.append(Figure("placement: all in memory, our step ÷ stock TorchRec's, worst", max(in_memory), "≤ 1.02", digits=3))
    return made
