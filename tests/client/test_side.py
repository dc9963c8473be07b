"""A site's side of the strategies: what it keeps, what leaves, and that rounds are those of the papers."""

from __future__ import annotations

from dataclasses import dataclass

import contracts
import laws
import numpy as np
import pytest
import torch

from client.own import OwnState, own_model
from client.side import side_of
from client.training import Trainer
from client.work import exact_releases
from server.accumulator import ExactMean
from server.strategies import strategy_for
from shared_models.errors import FederadError
from shared_models.local_layers import norm_parameters, staying
from shared_models.messages import Ask, Question, asked_sha256
from shared_models.networks import NETWORKS_FOR, WITH_NORMS
from shared_models.plan import Plan
from shared_models.schedule import learning_rate, local_steps
from shared_models.task import task_for
from shared_models.volume import Volume
from shared_models.weights import Weights, initial_weights, load_weights, norm_of, weights_of

RATE, N_ROUNDS = 0.1, 3
SIZES = {"site-1": 2, "site-2": 3}
"""Patients of each site."""


@dataclass(frozen=True)
class Person:
    key: str
    studies: tuple[str, ...]


class Cohort:
    """Patients in memory, the same for every split; a site's are its own."""

    def __init__(self, plan: Plan, site: str) -> None:
        self._people = [Person(f"{site}-{i}", (f"{site}-{i}",)) for i in range(SIZES[site])]
        self._volumes = {p.key: contracts.example_volume(plan, 7 * len(site) + i) for i, p in enumerate(self._people)}

    def patients(self, split: str) -> list[Person]:
        return self._people

    def volume(self, study: str) -> Volume:
        return self._volumes[study]


def plan_of(**strategy: object) -> Plan:
    """A plan without chance: samples are whole volumes, and a step takes one patient after the other of two epochs."""
    training = {
        "foreground": 0.0,
        "flips": False,
        "samples_per_patient": 1,
        "batch_size": 64,
        "epochs": 2,
        "optimizer": "sgd",
        "learning_rate": RATE,
    }
    plan = contracts.example_plan(training=training, strategy={**strategy, "release": "last"})
    return plan.model_copy(update={"rounds": N_ROUNDS})


class Federation:
    """Two sites and the server's arithmetic, without what carries the messages."""

    def __init__(self, plan: Plan, folder) -> None:
        self.plan, self.folder = plan, folder
        self.strategy = strategy_for(plan)
        self.weights: Weights = initial_weights(task_for(plan).build_network, 0)
        stays = staying(plan, task_for(plan).build_network())
        self.shapes = {name: array.shape for name, array in self.weights.items() if name not in stays}

    def ask(self, round_: int, kind: str = "train") -> Ask:
        control = self.strategy.control(self.weights) if kind == "train" else {}
        sha256 = asked_sha256(self.weights, control)
        return Ask(Question("a-run", round_, kind, self.plan.sha256, sha256), 0, self.weights, control)

    def own(self, site: str) -> OwnState:
        return OwnState(self.folder / site, "a-run", self.plan.sha256)

    def answer(self, site: str, ask: Ask) -> dict:
        releases = exact_releases(
            Trainer(self.plan, "cpu"), Cohort(self.plan, site), ask, site=site, own=self.own(site)
        )
        return {release.kind: release.value for release in releases}

    def round(self, number: int) -> None:
        ask, mean, per_step = self.ask(number), ExactMean(self.shapes), ExactMean(self.shapes)
        for site, n in SIZES.items():
            update = self.answer(site, ask)["update"]
            steps = np.float32(local_steps(self.plan, n))
            mean.add(update, n, norm_of(update))
            per_step.add({name: array / steps for name, array in update.items()}, n, norm_of(update))
        if self.strategy.wants_mean_per_step:
            self.strategy.learn(per_step.mean(), share=1.0, round_=number)
        self.weights = self.strategy.step(self.weights, mean.mean())

    def run(self) -> Weights:
        for number in range(1, N_ROUNDS + 1):
            self.round(number)
        return self.weights


def gradient_at(plan: Plan, site: str, weights: Weights) -> Weights:
    """Of the mean loss over a site's patients, by torch alone."""
    task, cohort = task_for(plan), Cohort(plan, site)
    network = task.build_network()
    load_weights(network, weights)
    rng = np.random.default_rng(0)
    samples = [task.draw(cohort.volume(p.key), rng) for p in cohort.patients("train")]
    image, target = (torch.from_numpy(np.stack([getattr(s, kind) for s in samples])) for kind in ("image", "target"))
    task.loss(network(image), target).backward()
    return {name: p.grad.numpy().copy() for name, p in network.named_parameters()}


def close(got: Weights, expected: Weights, names=None) -> None:
    for name in names or expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=2e-5, err_msg=name)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


class TestScaffold:
    def test_rounds_are_those_of_the_paper(self, tmp_path):
        """
        Three rounds give the weights of algorithm 1 of Karimireddy et al. (option II), written down in torch.
        """
        plan = plan_of(name="scaffold")
        federation = Federation(plan, tmp_path)
        x = dict(federation.weights)
        c, c_of = ({k: np.zeros_like(v) for k, v in x.items()} for _ in range(2))
        c_of = {site: {k: np.zeros_like(v) for k, v in x.items()} for site in SIZES}
        total = sum(SIZES.values())
        for _ in range(N_ROUNDS):
            dx, dc = ({k: np.zeros_like(v) for k, v in x.items()} for _ in range(2))
            for site, n in SIZES.items():
                y = dict(x)
                for _ in range(2):
                    g = gradient_at(plan, site, y)
                    y = {k: y[k] - RATE * (g[k] - c_of[site][k] + c[k]) for k in y}
                new = {k: c_of[site][k] - c[k] + (x[k] - y[k]) / (2 * RATE) for k in x}
                dx = {k: dx[k] + n / total * (y[k] - x[k]) for k in x}
                dc = {k: dc[k] + n / total * (new[k] - c_of[site][k]) for k in x}
                c_of[site] = new
            x, c = {k: x[k] + dx[k] for k in x}, {k: c[k] + dc[k] for k in c}

        close(federation.run(), x)
        close(federation.strategy.state, c)
        for site in SIZES:
            close(federation.own(site).before(federation.ask(N_ROUNDS, "validate").question), c_of[site])

    def test_it_is_not_averaging(self, tmp_path):
        """
        From the second round on the corrected gradients lead elsewhere.
        """
        some, others = (Federation(plan_of(name=n), tmp_path / n).run() for n in ("scaffold", "fedavg"))

        assert max(np.abs(some[name] - others[name]).max() for name in some) > 1e-4

    def test_server_of_another_plan_is_refused(self, tmp_path):
        """
        A control variate that does not fit the network is M210.
        """
        federation = Federation(plan_of(name="scaffold"), tmp_path)
        ask = federation.ask(1)
        ask = Ask(ask.question, 0, ask.weights, {name: array[:1] for name, array in ask.control.items()})

        with pytest.raises(FederadError) as caught:
            federation.answer("site-1", ask)
        assert caught.value.code == "M210"

    def test_control_variate_follows_from_what_has_left(self, tmp_path):
        """
        The server, or anybody who saw the answers, can compute it: it tells nothing that they did not.
        """
        federation = Federation(plan_of(name="scaffold"), tmp_path)
        ask = federation.ask(1)
        update = federation.answer("site-1", ask)["update"]
        kept = federation.own("site-1").before(Question("a-run", 2, "train", federation.plan.sha256, ""))

        scale = local_steps(federation.plan, SIZES["site-1"]) * learning_rate(federation.plan, 1)
        close(kept, {name: -ask.control[name] - array / scale for name, array in update.items()})


class TestFedBN:
    def test_every_network_with_norms_is_known(self):
        """
        The plan knows which networks have normalisation layers that learn, without building one.
        """
        found = {
            network
            for kind, networks in NETWORKS_FOR.items()
            for network in networks
            if norm_parameters(task_for(contracts.example_plan(kind, network)).build_network())
        }

        assert found == WITH_NORMS

    def test_rounds_are_those_of_the_paper(self, tmp_path):
        """
        Shared layers are averaged and normalisation layers go their own way, as algorithm 1 of Li et al. says.
        """
        plan = plan_of(name="fedbn")
        federation = Federation(plan, tmp_path)
        stays = norm_parameters(task_for(plan).build_network())
        sites = {site: dict(federation.weights) for site in SIZES}
        total = sum(SIZES.values())
        for _ in range(N_ROUNDS):
            for site, y in sites.items():
                for _ in range(2):
                    g = gradient_at(plan, site, y)
                    for k in y:
                        y[k] = y[k] - RATE * g[k]
            mean = {k: sum(n / total * sites[s][k] for s, n in SIZES.items()) for k in federation.weights}
            sites = {s: {k: w[k] if k in stays else mean[k] for k in w} for s, w in sites.items()}

        close(federation.run(), mean, mean.keys() - stays)
        for site, weights in sites.items():
            close(federation.own(site).before(federation.ask(N_ROUNDS, "test").question), weights, stays)

    def test_norms_never_leave_and_stay_as_they_were_at_the_server(self, tmp_path):
        """
        An answer has no array of a normalisation layer, and the shared model has those of its start.
        """
        federation = Federation(plan_of(name="fedbn"), tmp_path)
        start, stays = federation.weights, norm_parameters(task_for(federation.plan).build_network())
        left = federation.answer("site-1", federation.ask(1))["update"]
        after = federation.run()

        assert stays
        assert left.keys() == start.keys() - stays
        laws.assert_same_bits({name: after[name] for name in stays}, {name: start[name] for name in stays})

    def test_measures_with_its_own_norms(self, tmp_path):
        """
        What a site reports of a round is what its patients would get: shared layers with its own normalisation.
        """
        federation = Federation(plan_of(name="fedbn"), tmp_path)
        federation.run()
        ask = federation.ask(N_ROUNDS, "test")
        trainer, cohort = Trainer(federation.plan, "cpu"), Cohort(federation.plan, "site-1")
        mixed = federation.weights | federation.own("site-1").before(ask.question)
        expected = trainer.task.summary(list(trainer.measure(mixed, cohort, "test").values()))

        assert federation.answer("site-1", ask)["metric"] == expected


class TestDitto:
    def test_rounds_are_those_of_the_paper(self, tmp_path):
        """
        The own model takes the same steps with a pull to the shared one, as algorithm 1 of Li et al. says.
        """
        plan = plan_of(name="ditto", personal_pull=0.5)
        federation = Federation(plan, tmp_path)
        own = {site: dict(federation.weights) for site in SIZES}
        for number in range(1, N_ROUNDS + 1):
            w = federation.weights
            for site, v in own.items():
                for _ in range(2):
                    g = gradient_at(plan, site, v)
                    for k in v:
                        v[k] = v[k] - RATE * (g[k] + 0.5 * (v[k] - w[k]))
            federation.round(number)

        for site, weights in own.items():
            close(federation.own(site).before(federation.ask(N_ROUNDS, "test").question), weights)

    def test_shared_model_is_that_of_averaging(self, tmp_path):
        """
        What a site keeps for itself changes nothing that others get, bit for bit.
        """
        ditto, plain = plan_of(name="ditto", personal_pull=0.5), plan_of(name="fedavg")

        laws.assert_same_bits(Federation(ditto, tmp_path / "a").run(), Federation(plain, tmp_path / "b").run())

    def test_own_model_is_measured_at_the_end(self, tmp_path):
        """
        The test of the shared model comes with that of the site's own.
        """
        federation = Federation(plan_of(name="ditto", personal_pull=0.5), tmp_path)
        federation.run()
        metrics = federation.answer("site-1", federation.ask(N_ROUNDS, "test"))["metric"]

        assert {f"own:{name}" for name in ("dice", "hd95_mm")} <= metrics.keys()
        assert not [name for name in federation.answer("site-1", federation.ask(4))["metric"] if name.startswith("own")]


@pytest.mark.parametrize(
    "strategy",
    [{"name": "scaffold"}, {"name": "fedbn"}, {"name": "ditto", "personal_pull": 0.5}],
    ids=lambda t: t["name"],
)
class TestKept:
    def test_asked_again_it_gives_the_same_whatever_was_kept_since(self, strategy, tmp_path):
        """
        A round that is trained a second time, since a crash came before its answer was stored, gives the same bits.
        """
        federation = Federation(plan_of(**strategy), tmp_path)
        federation.round(1)
        first, again = (federation.answer("site-1", federation.ask(2)) for _ in range(2))

        laws.assert_same_bits(first["update"], again["update"])
        assert first["metric"] == again["metric"]

    def test_rounds_that_a_site_missed_leave_its_part_as_it_was(self, strategy, tmp_path):
        """
        A site that was away goes on from what it kept, however long ago; of older rounds nothing stays on the disk.
        """
        federation = Federation(plan_of(**strategy), tmp_path)
        federation.run()
        own, plan = federation.own("site-1"), federation.plan.sha256
        late, on_time = (own.before(Question("a-run", n, "train", plan, "")) for n in (9, N_ROUNDS + 1))

        laws.assert_same_bits(late, on_time)
        assert len(list((tmp_path / "site-1").rglob("*.safetensors"))) == 2
        assert own.before(Question("a-run", 1, "train", plan, "")) == {}

    def test_training_that_blew_up_spoils_no_later_round(self, strategy, tmp_path):
        """
        Values that are not finite are not kept: the site goes on from the round before.
        """
        federation = Federation(plan_of(**strategy), tmp_path)
        federation.round(1)
        own, question = federation.own("site-1"), federation.ask(2).question
        before = own.before(question)
        own.keep(question, {name: np.full_like(array, np.nan) for name, array in before.items()})

        laws.assert_same_bits(own.before(federation.ask(3).question), before)

    def test_nothing_is_shared_between_runs(self, strategy, tmp_path):
        """
        Another run of the same plan begins with nothing.
        """
        federation = Federation(plan_of(**strategy), tmp_path)
        federation.round(1)
        question = Question("another-run", 2, "train", federation.plan.sha256, "")

        assert OwnState(tmp_path / "site-1", "another-run", federation.plan.sha256).before(question) == {}

    def test_damaged_part_stops_the_site(self, strategy, tmp_path):
        """
        One changed bit is C134, and never another model.
        """
        federation = Federation(plan_of(**strategy), tmp_path)
        federation.round(1)
        path = next((tmp_path / "site-1").rglob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

        with pytest.raises(FederadError) as caught:
            federation.answer("site-1", federation.ask(2))
        assert caught.value.code == "C134"


class TestOwnModel:
    def test_it_is_the_shared_one_with_what_stayed(self, tmp_path):
        """
        FedBN's is the shared model with the site's norms, Ditto's is its own; other strategies have none, nor has a site
        that took no part.
        """
        for strategy in ({"name": "fedbn"}, {"name": "ditto", "personal_pull": 0.5}, {"name": "scaffold"}):
            federation = Federation(plan_of(**strategy), tmp_path / strategy["name"])
            shared, plan = federation.run(), federation.plan
            folder = tmp_path / strategy["name"] / "site-1"
            kept = federation.own("site-1").before(Question("a-run", N_ROUNDS, "test", plan.sha256, ""))
            own = own_model(folder, "a-run", plan, shared)

            if strategy["name"] == "scaffold":
                assert own is None
            else:
                laws.assert_same_bits(own, shared | kept)
            assert own_model(folder, "another-run", plan, shared) is None


class TestOthers:
    @pytest.mark.parametrize(
        "strategy", [{"name": "fedavg"}, {"name": "fedadam", "server_learning_rate": 0.1}], ids=str
    )
    def test_nothing_is_kept_where_nothing_is_needed(self, strategy, tmp_path):
        """
        Strategies that add nothing at the sites leave nothing there.
        """
        Federation(plan_of(**strategy), tmp_path).run()

        assert not list(tmp_path.iterdir())

    def test_failure_of_the_own_model_is_no_sign_under_privacy(self, tmp_path, monkeypatch):
        """
        Whatever goes wrong with an own model, which no noise hides, the round goes on as if nothing had.
        """
        privacy = {"noise_multiplier": 1.0, "patients_per_step": 2, "steps_per_round": 1}
        plan = contracts.example_plan(strategy={"name": "ditto", "personal_pull": 0.5}, privacy=privacy)
        trainer = Trainer(plan, "cpu")
        weights = weights_of(trainer.network)
        ask = Ask(Question("r", 1, "train", plan.sha256, ""), 0, weights)
        side = side_of(trainer, ask, {}, "site-1")
        monkeypatch.setattr(trainer, "train_own", lambda *a, **k: 1 / 0)

        assert side.kept({}, Cohort(plan, "site-1"), 0) == {}
