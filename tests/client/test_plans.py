"""Plans on their way from the operator's offer to somebody's yes or no."""

from __future__ import annotations

import json

import pytest
from contracts import example_plan
from deployed import CONSORTIUM, Operator

from client import plans as module
from client.plans import Plans
from shared_models.consortium import SignedPlan
from shared_models.errors import FederadError


def plan_named(name: str, rounds: int = 1):
    return example_plan().model_copy(update={"name": name, "rounds": rounds})


@pytest.fixture
def operator():
    return Operator()


@pytest.fixture
def plans(tmp_path, operator):
    plans = Plans(tmp_path)
    plans.trust(operator.name, operator.public_pem)
    (tmp_path / "plans").mkdir()
    return plans


def tampered(offer: bytes, **fields: object) -> bytes:
    return json.dumps({**json.loads(offer), **fields}, sort_keys=True, separators=(",", ":")).encode()


def other_plan(offer: bytes) -> bytes:
    return tampered(offer, plan=json.loads(offer)["plan"].replace('"rounds":1', '"rounds":2'))


class TestOffer:
    def test_signed_plan_is_listed_as_offered(self, plans, operator):
        """
        It waits for somebody, with its run and the time it was signed.
        """
        plan = plan_named("one")
        assert plans.offer(operator.sign(plan, "run-9")) is not None
        (listed,) = plans.listed()

        assert (listed.plan, listed.state, listed.run) == (plan, "offered", "run-9")
        assert plans.approved(plan.sha256) is None

    def test_same_offer_is_news_only_once(self, plans, operator):
        """
        The courier may bring it as often as it likes.
        """
        offer = operator.sign(plan_named("one"))
        assert plans.offer(offer) is not None
        assert plans.offer(offer) is None

    def test_offers_of_before_are_there_after_reopening(self, plans, operator, tmp_path):
        """
        A station that was restarted lists what was offered.
        """
        plans.offer(operator.sign(plan_named("one")))
        assert [listed.plan.name for listed in Plans(tmp_path).listed()] == ["one"]

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (lambda offer: tampered(offer, run="another"), "signature does not hold"),
            (other_plan, "signature does not hold"),
            (lambda offer: tampered(offer, signature=""), "signature does not hold"),
            (lambda offer: tampered(offer, signature="AAAA"), "signature does not hold"),
            (lambda offer: offer[:-1], "cannot be read"),
            (lambda offer: b"", "cannot be read"),
            (lambda offer: tampered(offer, more=1), "cannot be read"),
            (lambda offer: b" " * (module.LONGEST_OFFER + 1), "bytes"),
            (lambda offer: Operator().sign(plan_named("one")), "signature does not hold"),
        ],
        ids=["run", "plan", "unsigned", "other signature", "cut", "empty", "more", "endless", "other key"],
    )
    def test_anything_the_operator_did_not_sign_is_refused(self, plans, operator, change, why):
        """
        C159 says why, and nothing is kept.
        """
        with pytest.raises(FederadError, match=why) as error:
            plans.offer(change(operator.sign(plan_named("one"))))

        assert error.value.code == "C159"
        assert plans.listed() == []

    def test_plan_of_another_consortium_is_refused(self, plans, operator):
        """
        Even with the same key: the document says whose it is.
        """
        other = Operator("Another")
        other.key = operator.key
        with pytest.raises(FederadError, match="another consortium"):
            plans.offer(other.sign(plan_named("one")))

    def test_site_that_has_not_enrolled_takes_none(self, tmp_path, operator):
        """
        It knows no operator.
        """
        with pytest.raises(FederadError, match="has not enrolled"):
            Plans(tmp_path).offer(operator.sign(plan_named("one")))

    @pytest.mark.parametrize(
        "text", ['{"name":"x"}', "{}", "not json", '{"a":1}', example_plan().canonical_json().replace(":", ": ")]
    )
    def test_plan_that_reads_otherwise_here_is_refused(self, plans, operator, text):
        """
        Text that this version does not read, or would hash otherwise, cannot be approved.
        """
        signed = SignedPlan(plan=text, consortium=CONSORTIUM, run="r", issued="2026-01-01").signed(operator.key)
        with pytest.raises(FederadError, match="version of federad"):
            plans.offer(signed.encode())

    def test_offer_edited_on_disk_is_listed_no_more(self, plans, operator, tmp_path):
        """
        The signature is checked again whenever the list is made.
        """
        plan = plan_named("one")
        plans.offer(operator.sign(plan))
        file = tmp_path / "plans" / "offered" / f"{plan.sha256}.json"
        file.write_text(file.read_text().replace("one", "two"))
        assert plans.listed() == []


class TestNames:
    @pytest.fixture
    def offered(self, plans, operator):
        for plan in (plan_named("one"), plan_named("two"), plan_named("two", rounds=2)):
            plans.offer(operator.sign(plan))
        return plans

    def test_name_or_beginning_of_the_hash_finds_a_plan(self, offered):
        """
        As a person types it.
        """
        plan = plan_named("one")
        assert offered.named("one").plan == plan
        assert offered.named(plan.sha256[:10]).plan == plan
        assert offered.named(plan.sha256).plan == plan

    @pytest.mark.parametrize(("name", "why"), [("two", "2 plans fit"), ("three", "No plans fit"), ("", "No plans fit")])
    def test_none_or_several_is_an_error_that_lists_them(self, offered, name, why):
        """
        C160 with the plans and their hashes.
        """
        with pytest.raises(FederadError, match=why) as error:
            offered.named(name)
        assert error.value.code == "C160"
        assert plan_named("two").sha256[:12] in error.value.happened


class TestDecision:
    def test_plan_is_one_of_three_things(self, plans, operator):
        """
        Offered, then approved or refused, and the other way round.
        """
        plan = plan_named("one")
        plans.offer(operator.sign(plan))
        states = [plans.state(plan.sha256)]
        for decide in (
            lambda: plans.approve(plan, "c0de"),
            lambda: plans.refuse(plan),
            lambda: plans.approve(plan, "c0de"),
        ):
            decide()
            states.append(plans.state(plan.sha256))

        assert states == ["offered", "approved", "refused", "approved"]
        assert plans.approved(plan.sha256) == plan

    def test_file_under_another_name_approves_nothing(self, plans, operator, tmp_path):
        """
        A hash is what was approved; a plan put under that name is another.
        """
        one, two = plan_named("one"), plan_named("two")
        plans.approve(one, "c0de")
        (tmp_path / "plans" / f"{one.sha256}.json").write_text(two.canonical_json())

        assert plans.approved(one.sha256) is None
        assert plans.approved("../offered/x") is None
