"""A site that answers as no site should, in a deployment: the round goes on without it, and it is named."""

from __future__ import annotations

import pytest
from faults.staged import GOOD, ODD, plan_of
from faults.town import needs_town
from operators import needs_nginx

pytestmark = [pytest.mark.slow, pytest.mark.system, needs_nginx, needs_town]

EXPECTED = {
    "not a number": "not finite",
    "another shape": "shape",
    "extra tensor": "extra",
    "1000 x norm": "norm",
    "a replay": "answers another question",
    "noise": "cannot be read",
    "oversize": "ballast",
    "out of memory": "failed",
    "device lost": "failed",
}
"""What the third site does in a round, and what the operator reads of it."""


class TestHostileSite:
    def test_costs_itself_the_round_and_nobody_else(self, staged, tmp_path):
        """
        One fault a round: each is refused with its reason, nothing of it stays at the operator's, and the weights are those
        of the two other sites alone. A station whose device was lost starts anew by itself.
        """
        faults = [*EXPECTED, "not a number"]
        plan = plan_of("hostile", rounds=len(faults), strategy={"max_update_norm": 200.0})
        staged.odd.disturb(rounds={str(number): fault for number, fault in enumerate(faults, start=1)})
        station = staged.process(ODD, "client.cli station")
        run = staged.begin(plan)
        staged.until_state(run, "finished", within_s=300)

        for record, fault in zip(run.records(), faults, strict=True):
            assert record["replied"] == list(GOOD), fault
            (refused,) = record["refused"]
            assert refused["site"] == ODD
            assert EXPECTED[fault] in refused["reason"]
            assert record["missing"] == []
        assert staged.process(ODD, "client.cli station") != station
        assert list((staged.operator / "depot").iterdir()) == []
        assert run.result["weights_sha256"] == staged.in_process(plan[0], tmp_path, sites=GOOD)
