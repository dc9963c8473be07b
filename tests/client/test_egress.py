"""What the hospital's own people can read about everything that has left."""

from __future__ import annotations

import json

from client.egress import LAYOUTS, egress, noted, told
from shared_models.messages import Ask, Question, decode_answer, encode_ask
from shared_models.task import task_for
from shared_models.weights import initial_weights, weights_sha256
from simulation.stations import open_station

MANIFEST = {
    "update": {"shapes": {"conv.weight": [4, 1, 3, 3], "conv.bias": [4]}, "norm": 0.123456789},
    "metric": {"names": ["dice"]},
    "cost": {"values": {"epsilon": 2.5, "delta": 1e-5, "declared_size": 200}},
}


class TestManifest:
    def test_names_and_shapes_are_kept_once(self, tmp_path):
        """
        Every round of a plan has the same layout: one file, which the audit names by its hash.
        """
        first, second = noted(tmp_path, MANIFEST), noted(tmp_path, MANIFEST)
        (layout,) = (tmp_path / LAYOUTS).iterdir()

        assert first == second
        assert first["update"] == {"layout": layout.stem, "arrays": 2, "values": 40, "norm": 0.123457}
        assert json.loads(layout.read_text()) == MANIFEST["update"]["shapes"]

    def test_line_for_a_person_says_what_left(self, tmp_path):
        """
        Kinds, sizes, norm, names and cost; a refusal is its word.
        """
        line = told({"event": "answer", "again": False, "released": noted(tmp_path, MANIFEST)})

        assert line == (
            "update of 40 values in 2 arrays, norm 0.123; metric dice; cost epsilon 2.5, delta 1e-05, declared_size 200"
        )
        assert told({"event": "refusal", "word": "budget"}) == "refused: budget"

    def test_every_answer_of_a_station_stands_there(self, smoke_plan, stations):
        """
        One that trained, with the norm of what really left; asked again, the same bytes; nothing of another run.
        """
        station = open_station(stations[0])
        weights = initial_weights(task_for(smoke_plan).build_network, 0)
        question = Question("run-9", 1, "train", smoke_plan.sha256, weights_sha256(weights))
        data = encode_ask(Ask(question, 0, weights))

        update = decode_answer(station.answer(data)).update
        station.answer(data)
        trained, again = egress(station.folder, "run-9")

        norm = sum(float((array.astype("f8") ** 2).sum()) for array in update.values()) ** 0.5
        assert abs(trained["released"]["update"]["norm"] / norm - 1) < 1e-4
        assert trained["released"]["update"]["arrays"] == len(update)
        assert told(again) == "the same bytes again"
        assert not list(egress(station.folder, "run-8"))
