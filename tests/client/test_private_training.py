"""Private training seen from outside: what moves, how far, and what one patient can do about it."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import contracts
import laws
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from scipy import stats
from test_training import Cohort, Person, cohort_of, distance, start_of
from torch import nn

from client import training
from client.network_contract import check_network
from client.privacy import Mechanism, SystemRandomness
from client.training import PatientGradients, Trainer
from shared_models.errors import FederadError
from shared_models.plan import Plan, PrivacyTable
from shared_models.task import Task, task_for
from shared_models.weights import Weights, initial_weights, load_weights

N_STEPS = 3


def private_plan(
    case: tuple[str, str, int] = ("segmentation", "unet", 2),
    *,
    privacy: dict | None = None,
    training: dict | None = None,
    **tables: dict,
) -> Plan:
    """The smallest plan with privacy, as the station will get it."""
    table = {"noise_multiplier": 1.0, "patients_per_step": 2, "steps_per_round": N_STEPS, **(privacy or {})}
    learning = {"optimizer": "sgd", "learning_rate": 0.1, "samples_per_patient": 2, **(training or {})}
    tables["strategy"] = {"release": "last", **tables.get("strategy", {})}
    plan = contracts.example_plan(*case, training=learning, **tables)
    return plan.model_copy(update={"privacy": PrivacyTable(**table)})


class Scripted:
    """Everybody takes part unless said otherwise; the step's secret is its number; noise as asked for, or none."""

    def __init__(self, takes_part: float | None = None, *, noise: bool = False) -> None:
        self.takes_part, self.noise = takes_part, noise
        self.rates: list[float] = []
        self.drawn = 0
        self.sigmas: set[float] = set()
        self._secrets = 0

    def coins(self, n: int, q: float) -> np.ndarray:
        self.rates.append(q)
        return np.ones(n, np.bool_) if self.takes_part is None else np.arange(n) < self.takes_part

    def gaussian(self, n: int, sigma: float) -> np.ndarray:
        self.drawn += n
        self.sigmas.add(sigma)
        return SystemRandomness().gaussian(n, sigma) if self.noise else np.zeros(n, np.int64)

    def secret(self) -> bytes:
        self._secrets += 1
        return self._secrets.to_bytes(32, "little")


def trained(plan: Plan, cohort: Cohort, randomness=None, **options: object) -> Weights:
    trainer = Trainer(plan, "cpu", randomness=randomness or Scripted())
    return trainer.train_private(
        start_of(plan), cohort, **{"round_": 1, "declared_size": 4, "noise_multiplier": 1.0, **options}
    )


def sums_of(plan: Plan, cohort: Cohort, monkeypatch: pytest.MonkeyPatch, randomness=None) -> list[torch.Tensor]:
    """The integer sum of every step of a round."""
    seen: list[torch.Tensor] = []
    real = training.PatientSum.noised

    def noised(self, randomness):
        seen.append(self.integers.clone())
        return real(self, randomness)

    with monkeypatch.context() as patched:
        patched.setattr(training.PatientSum, "noised", noised)
        trained(plan, cohort, randomness)
    return seen


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def without_gradients(monkeypatch):
    """Every loss is flat, so that whatever moves was moved by noise."""
    monkeypatch.setattr(Task, "loss", None, raising=False)
    for kind in {type(contracts.task_of(case)) for case in contracts.every_case()}:
        monkeypatch.setattr(kind, "loss", lambda self, output, target: 0.0 * output.sum())


class Recorder:
    """Takes the place of a sum: keeps each patient's gradient and the clipped sum in double precision."""

    def __init__(self, mechanism: Mechanism) -> None:
        self.mechanism = mechanism
        self.gradients: list[torch.Tensor] = []
        self.total = 0.0

    def add(self, gradient: torch.Tensor, seed: int) -> bool:
        from client.privacy import clipped

        self.gradients.append(gradient.clone())
        self.total = self.total + clipped(gradient, self.mechanism)
        return True


def by_loop(network: nn.Module, task: Task, per_patient: list[list], clip: float) -> np.ndarray:
    """The clipped sum by hand: every sample's gradient on its own, mean, norm and sum in NumPy."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    like = next(iter(leaves.values()))
    total = 0.0
    for samples in per_patient:
        each = []
        for sample in samples:
            image, target = torch.from_numpy(sample.image)[None].to(like), torch.from_numpy(sample.target)[None]
            loss = task.loss(torch.func.functional_call(network, leaves, (image,)), target)
            parts = torch.autograd.grad(loss, list(leaves.values()))
            each.append(np.concatenate([part.double().numpy().ravel() for part in parts]))
        mean = np.mean(each, axis=0)
        total = total + mean * min(1.0, clip / math.sqrt(float(mean @ mean)))
    return total


class TestClippedSum:
    @pytest.mark.parametrize("case", contracts.every_case(), ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}d")
    @pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
    @pytest.mark.parametrize("clip", [0.01, 100.0], ids=["all clipped", "none clipped"])
    def test_is_that_of_a_loop_written_independently(self, case, dtype, within, clip, monkeypatch):
        """
        For every network: the sum of clipped patients equals one taken sample by sample with other tools.
        """
        plan = private_plan(case, training={"samples_per_patient": 3}, privacy={"clip": clip})
        task = task_for(plan)
        torch.manual_seed(0)
        network = task.build_network().to(dtype).train()
        drawn: list = []
        draw = task.draw
        monkeypatch.setattr(task, "draw", lambda volume, rng: drawn.append(draw(volume, rng)) or drawn[-1])
        cohort = cohort_of(plan, n_studies=2, sides=(8, 16, 16))
        recorder = Recorder(Mechanism(sampling_rate=1.0, noise_multiplier=1.0, clip=clip, divisor=1))
        gradients = PatientGradients(network, task, cohort, Trainer(plan, "cpu")._precision)
        gradients.add_to(recorder, range(4), b"secret")
        expected = by_loop(network, task, [drawn[3 * i : 3 * i + 3] for i in range(4)], clip)

        assert len(drawn) == 12
        norm = np.linalg.norm(expected)
        assert np.linalg.norm(recorder.total.numpy() - expected) <= within * norm

    def test_views_are_averaged_within_the_patient(self, monkeypatch):
        """
        Each sample is seen as often as the plan says, and all views count as one patient.
        """
        plan = private_plan(privacy={"views": 3})
        task = task_for(plan)
        drawn: list = []
        draw = task.draw
        monkeypatch.setattr(task, "draw", lambda volume, rng: drawn.append(draw(volume, rng)) or drawn[-1])
        network = task.build_network().double()
        recorder = Recorder(Mechanism(sampling_rate=1.0, noise_multiplier=1.0, clip=0.01, divisor=1))
        PatientGradients(network, task, cohort_of(plan, 1), Trainer(plan, "cpu")._precision).add_to(
            recorder, [0], b"secret"
        )

        assert len(drawn) == 2 * 3
        np.testing.assert_allclose(recorder.total.numpy(), by_loop(network, task, [drawn], 0.01), atol=1e-11)


class TestNoiseAlone:
    PLAN = private_plan(
        privacy={"noise_multiplier": 1.5, "clip": 0.7, "patients_per_step": 5, "steps_per_round": 4},
        task={"channels": [32, 64]},
    )
    STANDARD_DEVIATION = math.sqrt(4) * 0.1 * 1.5 * 0.7 / 5
    """sqrt(T) * lr * sigma * C / B."""

    def moved(self, **options: object) -> Weights:
        cohort = cohort_of(self.PLAN, 2)
        return trained(self.PLAN, cohort, SystemRandomness(), noise_multiplier=1.5, **options)

    @pytest.mark.usefixtures("without_gradients")
    def test_every_tensor_moves_by_the_noise_that_was_paid_for(self):
        """
        With flat losses each parameter tensor has the variance T (lr sigma C / B)^2, and all together to within 1 %.
        """
        wide = self.PLAN.model_copy(update={"task": self.PLAN.task.model_copy(update={"channels": (160, 320)})})
        update = trained(wide, cohort_of(wide, 2), SystemRandomness(), noise_multiplier=1.5)
        everything = np.concatenate([part.ravel() for part in update.values()])

        for name, part in update.items():
            below, above = stats.chi2.ppf([1e-7, 1 - 1e-7], part.size)
            assert below < (part.astype(float) ** 2).sum() / self.STANDARD_DEVIATION**2 < above, name
        assert everything.size > 500_000
        assert abs(everything.var() / self.STANDARD_DEVIATION**2 - 1) < 0.01
        assert stats.kstest(everything[:50_000] / self.STANDARD_DEVIATION, "norm").pvalue > 1e-6

    @pytest.mark.usefixtures("without_gradients")
    def test_two_rounds_and_two_sites_share_no_noise(self):
        """
        The same plan again, and another site's, have noise of their own: no correlation beyond chance.
        """
        runs = [np.concatenate([part.ravel() for part in self.moved().values()]) for _ in range(3)]

        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert abs(np.corrcoef(runs[a], runs[b])[0, 1]) < 5 / math.sqrt(runs[0].size)

    def test_nobody_to_train_on_still_gives_every_step_its_noise(self):
        """
        A site whose patients never come up releases the noise of all its steps, like any other.
        """
        cohort, source = cohort_of(self.PLAN, 2), Scripted(takes_part=0, noise=True)
        update = trained(self.PLAN, cohort, source, noise_multiplier=1.5)

        assert not cohort.read
        assert source.drawn == 4 * sum(part.size for part in update.values())
        spread = np.concatenate([part.ravel() for part in update.values()]).std()
        assert abs(spread / self.STANDARD_DEVIATION - 1) < 0.03

    def test_noise_and_rates_are_those_of_the_plan_for_any_private_size(self):
        """
        What the source of noise sees is the same for two patients and for five: rates, deviations, number of draws.
        """
        seen = []
        for n_patients in (2, 5):
            source = Scripted()
            trained(self.PLAN, cohort_of(self.PLAN, n_patients), source, noise_multiplier=1.5, declared_size=20)
            seen.append((source.rates, source.drawn, source.sigmas))

        assert seen[0] == seen[1]
        assert seen[0][0] == [0.25] * 4


class TestStep:
    def test_divisor_is_the_plans_however_many_take_part(self):
        """
        One patient alone, clipped, moves the weights by lr C / B.
        """
        plan = private_plan(privacy={"clip": 1e-3, "patients_per_step": 8, "steps_per_round": 1})
        for n_patients in (1, 4):
            update = trained(plan, cohort_of(plan, n_patients), Scripted(takes_part=1))
            assert distance(update) == pytest.approx(0.1 * 1e-3 / 8, rel=1e-3)

    def test_weight_decay_and_proximal_term_act_after_the_noise(self):
        """
        They are not clipped with the patients: with nobody there and no noise they follow their formulas.
        """
        plan = private_plan(
            training={"weight_decay": 0.5}, strategy={"name": "fedprox", "proximal_mu": 2.0}, privacy={"clip": 1e-6}
        )
        start, update = start_of(plan), trained(plan, cohort_of(plan, 1), Scripted(takes_part=0))
        for name, first in start.items():
            weight = first.astype(float)
            for _ in range(N_STEPS):
                weight = weight - 0.1 * (0.5 * weight + 2.0 * (weight - first))
            np.testing.assert_allclose(update[name], weight - first, rtol=1e-4, atol=1e-7)

    def test_schedule_follows_the_round(self):
        """
        A falling learning rate falls with the round, which is public.
        """
        plan = private_plan(training={"schedule": "cosine"}).model_copy(update={"rounds": 10})
        first, last = (distance(trained(plan, cohort_of(plan), Scripted(), round_=n)) for n in (1, 10))

        assert last < first / 20

    def test_progress_counts_steps_of_the_plan(self):
        """
        The outside hears of steps out of the public number of steps, whoever takes part.
        """
        told = []
        for takes_part in (0, 4):
            heard: list[tuple[int, int]] = []
            plan = private_plan()
            trained(plan, cohort_of(plan), Scripted(takes_part=takes_part), on_progress=lambda *s, h=heard: h.append(s))
            told.append(heard)

        assert told[0] == told[1] == [(1, 3), (2, 3), (3, 3)]

    def test_mixed_precision_has_no_scale_that_adapts(self):
        """
        With bfloat16 the update stays near that of float32, and nothing in the loop scales the loss.
        """
        exact, mixed = (
            trained(private_plan(training={"precision": p}), cohort_of(private_plan()), Scripted())
            for p in ("float32", "bfloat16")
        )

        assert distance({n: exact[n] - mixed[n] for n in exact}) < 0.3 * distance(exact)
        assert "GradScaler" not in inspect.getsource(training)


class TestFailClosed:
    def test_plain_training_refuses_a_private_plan(self):
        """
        A private plan never trains without its noise, whatever path leads there.
        """
        plan = private_plan()
        with pytest.raises(ValueError, match="privacy"):
            Trainer(plan, "cpu").train(start_of(plan), cohort_of(plan), seed=0, site="a", round_=1)

    def test_private_training_refuses_another_plan_and_other_noise(self):
        """
        Without [privacy], or with less noise than the plan gives, nothing trains.
        """
        public = contracts.example_plan()
        for plan, noise in ((public, 1.0), (private_plan(), 0.5)):
            with pytest.raises(ValueError, match="not what the plan says"):
                trained(plan, cohort_of(plan), noise_multiplier=noise)

    def test_no_seed_reaches_private_training(self):
        """
        There is no argument through which a plan's or the server's seed could decide sampling or noise.
        """
        assert "seed" not in inspect.signature(Trainer.train_private).parameters

    def test_nothing_but_the_update_comes_out(self):
        """
        No loss, no count of patients: the names and shapes of the update are those of the weights.
        """
        plan = private_plan()
        update = trained(plan, cohort_of(plan))

        assert {n: a.shape for n, a in update.items()} == {n: a.shape for n, a in start_of(plan).items()}

    def test_failing_device_ends_the_round_without_a_release(self, monkeypatch):
        """
        Where the device itself is lost there is no round: all steps, or nothing.
        """
        plan = private_plan()
        monkeypatch.setattr(
            PatientGradients, "_mean_gradient", lambda *_: (_ for _ in ()).throw(torch.AcceleratorError("gone"))
        )
        with pytest.raises(torch.AcceleratorError):
            trained(plan, cohort_of(plan))


def hostile(kind: str, plan: Plan, cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> Cohort:
    """The cohort with one more patient, last, whose study is trouble."""
    volume = contracts.example_volume(plan, 99)
    match kind:
        case "NaN pixels":
            volume = replace(volume, image=np.full_like(volume.image, np.nan))
        case "one infinite pixel":
            image = volume.image.copy()
            image.flat[7] = np.inf
            volume = replace(volume, image=image)
        case "1000 times as bright":
            volume = replace(volume, image=1000 * volume.image)
        case "unseen class":
            volume = replace(volume, label=np.full_like(volume.label, 77))
        case "no label":
            volume = replace(volume, label=None)
        case "oversize":
            volume = contracts.example_volume(plan, 99, (5, 150, 170))
        case "other channels":
            volume = replace(volume, image=np.concatenate([volume.image] * 3))
    bad = Person("bad", ("bad-s0", "bad-s1"))
    volumes = {**cohort.volumes, **({} if kind == "truncated file" else {"bad-s0": volume, "bad-s1": volume})}
    return Cohort(volumes, {**cohort.people, "train": [*cohort.people["train"], bad]})


class TestTwins:
    KINDS = (
        "NaN pixels",
        "one infinite pixel",
        "1000 times as bright",
        "unseen class",
        "no label",
        "oversize",
        "other channels",
        "truncated file",
    )

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("clipping", [{}, {"clipping": "automatic", "clip_gamma": 0.01}], ids=["flat", "automatic"])
    def test_one_patient_more_moves_a_sum_by_at_most_the_clip(self, kind, clipping, monkeypatch):
        """
        Two cohorts that differ by one hostile patient: the first step's sums differ by a norm of at most C.
        """
        plan = private_plan(privacy={"clip": 0.05, "steps_per_round": 1, **clipping})
        cohort = cohort_of(plan, 3)
        (without,) = sums_of(plan, cohort, monkeypatch)
        (along,) = sums_of(plan, hostile(kind, plan, cohort, monkeypatch), monkeypatch)
        limit = Mechanism.of(plan.privacy, declared_size=4, noise_multiplier=1.0).largest_square

        assert int((along - without).square().sum()) <= limit
        if kind not in ("1000 times as bright", "oversize", "other channels"):
            assert torch.equal(along, without)

    @pytest.mark.parametrize("kind", ["NaN pixels", "unseen class", "truncated file"])
    def test_silent_patient_changes_nothing_of_the_round(self, kind, monkeypatch):
        """
        A patient that gives nothing leaves the whole round bit for bit as it was, and its progress too.
        """
        plan = private_plan()
        cohort = cohort_of(plan, 3)

        laws.assert_same_bits(
            trained(plan, cohort, Scripted()), trained(plan, hostile(kind, plan, cohort, monkeypatch), Scripted())
        )

    def test_bad_patient_is_logged_here_without_what_it_holds(self, monkeypatch, caplog):
        """
        The station's own log says that somebody gave nothing and why, by keyed hash and kind of trouble.
        """
        plan = private_plan(privacy={"steps_per_round": 1})
        trained(plan, hostile("NaN pixels", plan, cohort_of(plan, 1), monkeypatch))

        assert [record.getMessage() for record in caplog.records] == [
            "patient bad gives nothing to this step: values that are not finite"
        ]

    def test_augmentation_belongs_to_patient_and_step(self, monkeypatch):
        """
        What is drawn of a patient is the same whoever else takes part, and another in the next step.
        """
        plan = private_plan()
        seen: dict[bool, list] = {}
        for alone in (True, False):
            trainer = Trainer(plan, "cpu", randomness=Scripted(takes_part=1 if alone else 3))
            draw, drawn = trainer.task.draw, []
            monkeypatch.setattr(
                trainer.task,
                "draw",
                lambda volume, rng, d=drawn, f=draw: d.append(f(volume, rng).image) or f(volume, rng),
            )
            trainer._is_checked = True
            trainer.train_private(
                start_of(plan), cohort_of(plan, 3, sides=(8, 32, 32)), round_=1, declared_size=4, noise_multiplier=1.0
            )
            seen[alone] = [np.stack(drawn[i : i + 2]) for i in range(0, len(drawn), 2)]

        np.testing.assert_array_equal(seen[True], seen[False][::3])
        assert not np.array_equal(seen[True][0], seen[True][1])

    def test_randomness_inside_the_network_belongs_to_patient_and_step(self, monkeypatch):
        """
        Dropout of one patient does not move because another one came before.
        """
        plan = private_plan(privacy={"clip": 0.05, "steps_per_round": 1})
        build = type(task_for(plan)).build_network
        monkeypatch.setattr(
            type(task_for(plan)), "build_network", lambda self: nn.Sequential(nn.Dropout(0.5), build(self))
        )
        cohort = cohort_of(plan, 3)
        first = replace(cohort, people={"train": cohort.people["train"][2:]})
        (alone,), (along,) = (sums_of(plan, each, monkeypatch) for each in (first, cohort))
        without = replace(cohort, people={"train": cohort.people["train"][:2]})
        (others,) = sums_of(plan, without, monkeypatch)

        assert torch.equal(along, alone + others)


class TestMemory:
    def out_of_memory_above(self, n: int, monkeypatch: pytest.MonkeyPatch, message: str = "") -> list[int]:
        """A device on which no more than ``n`` samples fit; the sizes that were tried."""
        tried: list[int] = []
        forward = UNet.forward

        def limited(self, image):
            tried.append(len(image))
            if len(image) > n:
                raise RuntimeError(message) if message else torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, image)

        monkeypatch.setattr(Trainer, "_check_once", lambda self: None)
        monkeypatch.setattr(UNet, "forward", limited)
        return tried

    @pytest.mark.parametrize("message", ["", "[enforce fail] DefaultCPUAllocator: can't allocate memory"])
    @pytest.mark.parametrize("fits", [1, 2, 3])
    def test_smaller_physical_batches_give_the_same_update(self, fits, message, monkeypatch):
        """
        Where a patient's samples do not fit at once they are taken in parts, and the patient counts as ever.
        """
        plan = private_plan(training={"samples_per_patient": 5}, privacy={"steps_per_round": 1})
        cohort = cohort_of(plan, 2)
        whole = trained(plan, cohort, Scripted())
        tried = self.out_of_memory_above(fits, monkeypatch, message)
        parts = trained(plan, cohort, Scripted())

        assert tried[:2] == [5, 3]
        assert distance({n: whole[n] - parts[n] for n in whole}) < 1e-5 * distance(whole)

    def test_each_patient_starts_from_the_whole_again(self, monkeypatch):
        """
        How one patient had to be split says nothing to the next: a patient's gradient is its own.
        """
        plan = private_plan(training={"samples_per_patient": 4}, privacy={"steps_per_round": 1})
        tried = self.out_of_memory_above(2, monkeypatch)
        trained(plan, cohort_of(plan, 2), Scripted())

        assert tried == [4, 2, 2, 4, 2, 2]

    def test_patient_that_does_not_fit_at_all_gives_zero(self, monkeypatch):
        """
        At one sample there is nothing left to halve: the patient is silent and the round goes on.
        """
        plan = private_plan()
        self.out_of_memory_above(0, monkeypatch)

        assert distance(trained(plan, cohort_of(plan), Scripted())) == 0


class BatchAttention(nn.Module):
    """Adds the mean over the batch."""

    def forward(self, x):
        return x + x.mean(0, keepdim=True)


class Memory(nn.Module):
    """Remembers the last batch, in an attribute that is no buffer."""

    def __init__(self):
        super().__init__()
        self.last = 0.0

    def forward(self, x):
        out = x + self.last
        self.last = float(x.detach().mean())
        return out


class Counter(nn.Module):
    """Counts batches in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x):
        self.n += 1
        return x


class PredictsWithMemory(nn.Module):
    """Harmless while training; predicts with what it saw last."""

    def __init__(self):
        super().__init__()
        self.last = 0.0

    def forward(self, x):
        if not self.training:
            return x + self.last
        self.last = float(x.detach().mean())
        return x


class Unforeseeable(nn.Module):
    """Draws from a generator that nobody seeds."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng()

    def forward(self, x):
        return x * float(self.rng.normal())


class Unused(nn.Module):
    """Holds a parameter that nothing reads."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x


class Frozen(nn.Module):
    """Holds a parameter that is not trained."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        return x * self.factor


class TestNetworkContract:
    @pytest.mark.parametrize("case", contracts.every_case(), ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}d")
    def test_every_network_of_the_house_keeps_it(self, case):
        """
        All networks and tasks that a plan can name may be trained with privacy, and the check leaves them as they were.
        """
        task = task_for(private_plan(case))
        before = initial_weights(task.build_network, 1)
        network = task.build_network()
        load_weights(network, before)
        check_network(network, task)

        laws.assert_same_bits({n: p.detach().numpy() for n, p in network.named_parameters()}, before)

    @pytest.mark.parametrize("dimensions", [2, 3])
    @pytest.mark.parametrize(
        ("layer", "found"),
        [
            (lambda n: (nn.BatchNorm2d if n == 2 else nn.BatchNorm3d)(1), "buffer"),
            (lambda n: (nn.BatchNorm2d if n == 2 else nn.BatchNorm3d)(1, track_running_stats=False), "same batch"),
            (lambda n: BatchAttention(), "same batch"),
            (lambda n: Memory(), "predict|later"),
            (lambda n: Counter(), "buffer"),
            (lambda n: PredictsWithMemory(), "predicted"),
            (lambda n: Unforeseeable(), "predict|alike"),
            (lambda n: Unused(), "spare gets no gradient"),
            (lambda n: Frozen(), "factor is not trained"),
        ],
        ids=[
            "BatchNorm",
            "BatchNorm without buffers",
            "attention",
            "memory",
            "counter",
            "late",
            "rng",
            "unused",
            "frozen",
        ],
    )
    def test_layer_through_which_patients_meet_is_refused(self, dimensions, layer, found):
        """
        By what it does and not by its name, before the first step.
        """
        task = contracts.task_of(("segmentation", "unet", dimensions))
        network = nn.Sequential(layer(dimensions), task.build_network())
        with pytest.raises(FederadError, match=f"(?s)M216.*({found})"):
            check_network(network, task)

    def test_trainer_refuses_such_a_network_whatever_weights_arrive(self, monkeypatch):
        """
        Zeros from a lying server hide no layer: what is checked are weights of the trainer's own.
        """
        plan = private_plan()
        build = type(task_for(plan)).build_network
        monkeypatch.setattr(
            type(task_for(plan)), "build_network", lambda self: nn.Sequential(BatchAttention(), build(self))
        )
        trainer = Trainer(plan, "cpu", randomness=Scripted())
        zeros = {name: np.zeros(tuple(p.shape), np.float32) for name, p in trainer.network.named_parameters()}
        load_weights(trainer.network, zeros)
        with pytest.raises(FederadError, match="M216"):
            trainer.train_private(zeros, cohort_of(plan), round_=1, declared_size=4, noise_multiplier=1.0)
