"""Mistakes that would void the promise to patients, as patches to the source, with the tests that must fail on each.

A patch is one mistake that somebody could make or has made: most are read off the rules of privacy, some off bugs of other
systems. The old text stands exactly once in its file, so no patch goes stale unnoticed (``tests/test_broken_builds.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PRIVACY = "tests/client/test_privacy.py"
TRAINING = "tests/client/test_private_training.py"
IMAGES = "tests/client/test_image_privacy.py"
LEDGER = "tests/client/test_ledger.py"
ACCOUNTING = "tests/client/test_accounting.py"
POLICY = "tests/client/test_policy.py"
GATE = "tests/client/test_gate.py"
STATION = "tests/client/test_private_station.py"
ANY_STATION = "tests/client/test_station.py"
PLAN = "tests/shared_models/test_plan.py"
NOISED = "tests/shared_models/test_noised.py"
TWINS = "tests/client/test_twin_stations.py"
OUTSIDE = "tests/client/test_noise_from_outside.py"
CANARIES = "tests/client/test_canaries.py"
INVERSION = "tests/client/test_gradient_inversion.py"
LIAR = "tests/client/test_lying_server.py"
ADAPTED = "tests/client/test_adapted_training.py"
ADAPTATION = "tests/shared_models/test_adaptation.py"
EGRESS = "tests/client/test_egress.py"
FINGERPRINT = "tests/client/test_fingerprint.py"
RESULTS = "tests/server/test_results.py"
COMPARISON = "tests/simulation/test_private_comparison.py"
LEAVING = "tests/client/test_leaving.py"
SEALED = "tests/client/data/test_sealed.py"
DEIDENTIFIED = "tests/client/data/test_deidentify.py"
PREDICTED = "tests/client/data/test_inference.py"
IDENTITY = "tests/client/data/test_archive_identity.py"
MOMENTS = "tests/client/test_site_moments.py"
LAYOUT = "tests/shared_models/test_moments.py"
AVERAGE = "tests/server/test_rounds.py::TestRun::test_average_over_rounds_is_tested_and_released"


@dataclass(frozen=True)
class Change:
    """A piece of a file, and what stands in its place in the broken build."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Patch:
    """One broken build."""

    name: str
    changes: tuple[Change, ...]
    caught_by: tuple[str, ...]
    """Tests that must fail on it, every one of them: ``file::Class::test``, of all whose parameters at least one."""

    is_of_the_nine: bool = False
    """Whether it is one of the mistakes that ``make test-system`` looks for each time."""

    def apply(self, build: Path) -> None:
        """Break the copy of the source in ``build``.

        Raises
        ------
        ValueError
            If an old text does not stand exactly once in its file.
        """
        for change in self.changes:
            file = build / change.file
            text = file.read_text(encoding="utf-8")
            if text.count(change.old) != 1:
                raise ValueError(
                    f"{self.name}: the old text stands {text.count(change.old)} times in {change.file}:\n{change.old}"
                )
            file.write_text(text.replace(change.old, change.new), encoding="utf-8")


def patch(name: str, *changes: tuple[str, str, str], caught_by: tuple[str, ...], nine: bool = False) -> Patch:
    """A patch of (file, old text, new text)."""
    return Patch(name, tuple(Change(*change) for change in changes), caught_by, nine)


_THE_NINE = (
    patch(
        "no clip",
        (
            "client/privacy.py",
            "return values.mul_(limit / norm) if norm > limit else values",
            "return values",
        ),
        ("client/privacy.py", "if int(squares.sum()) > mechanism.largest_square:", "if False:"),
        caught_by=(
            f"{PRIVACY}::TestClipping::test_patient_adds_at_most_the_clip_exactly",
            f"{TRAINING}::TestTwins::test_one_patient_more_moves_a_sum_by_at_most_the_clip",
            f"{CANARIES}::test_patients_of_a_private_run_cannot_be_told_from_those_who_stayed_away",
        ),
        nine=True,
    ),
    patch(
        "half noise",
        (
            "client/privacy.py",
            "randomness.gaussian(len(part), self.mechanism.sigma)",
            "randomness.gaussian(len(part), self.mechanism.sigma / 2)",
        ),
        caught_by=(
            f"{PRIVACY}::TestNoisedSum::test_empty_sum_is_noised_all_the_same",
            f"{TRAINING}::TestNoiseAlone::test_every_tensor_moves_by_the_noise_that_was_paid_for",
            f"{OUTSIDE}::TestStation::test_every_tensor_that_leaves_has_the_variance_that_was_paid_for",
        ),
        nine=True,
    ),
    patch(
        "clip per sample",
        (
            "client/training.py",
            """\
        add_vectors(total, taking_part, lambda one: self._gradient(one, secret), secret, "this step")
""",
            """\
        for one in taking_part:
            rng = np.random.default_rng(patient_seed(secret, one.key, "augmentation"))
            for sample in self._draw(one, rng):
                add_vectors(total, [one], lambda _, s=sample: self._mean_gradient([s], 1), secret, "this step")
""",
        ),
        caught_by=(
            f"{TRAINING}::TestClippedSum::test_is_that_of_a_loop_written_independently",
            f"{TRAINING}::TestTwins::test_one_patient_more_moves_a_sum_by_at_most_the_clip",
        ),
        nine=True,
    ),
    patch(
        "noise missing on one layer",
        (
            "client/privacy.py",
            "total = self.integers.cpu().numpy()\n",
            "total = self.integers.cpu().numpy()\n        last_bias = total[-2:].copy()\n",
        ),
        (
            "client/privacy.py",
            "        return torch.from_numpy(total).to(torch.float64)",
            "        total[-2:] = last_bias\n        return torch.from_numpy(total).to(torch.float64)",
        ),
        caught_by=(
            f"{PRIVACY}::TestNoisedSum::test_empty_sum_is_noised_all_the_same",
            f"{OUTSIDE}::TestStation::test_every_tensor_that_leaves_has_the_variance_that_was_paid_for",
        ),
        nine=True,
    ),
    patch(
        "reused seed",
        ("client/privacy.py", "os.urandom(32), bytes(4) + os.urandom(12)", "bytes(32), bytes(16)"),
        caught_by=(
            f"{PRIVACY}::TestSystemRandomness::test_no_draw_comes_twice",
            f"{PRIVACY}::TestSystemRandomness::test_child_process_draws_its_own",
            f"{TRAINING}::TestNoiseAlone::test_two_rounds_and_two_sites_share_no_noise",
        ),
        nine=True,
    ),
    patch(
        "accountant reset each round",
        (
            "client/ledger.py",
            "return epsilon([*self.runs.get(run, ()), *more], delta)",
            "return epsilon([*self.runs.get(run, ())][-1:] + [*more], delta)",
        ),
        caught_by=(
            f"{LEDGER}::TestCharges::test_rounds_of_a_run_are_reckoned_together",
            f"{STATION}::TestCost::test_epsilon_is_what_a_second_accountant_finds",
        ),
        nine=True,
    ),
    patch(
        "private divisor",
        (
            "client/training.py",
            "        mechanism = Mechanism.of(privacy, declared_size=declared_size, noise_multiplier=noise_multiplier)\n",
            """\
        mechanism = Mechanism.of(privacy, declared_size=declared_size, noise_multiplier=noise_multiplier)
        object.__setattr__(mechanism, "divisor", len(cohort.patients("train")))
""",
        ),
        caught_by=(
            f"{TRAINING}::TestStep::test_divisor_is_the_plans_however_many_take_part",
            f"{TWINS}::TestTrainingPatient::test_hostile_patient_shows_in_the_parameters_alone[an ordinary one]",
        ),
        nine=True,
    ),
    patch(
        "shared augmentation stream",
        (
            "client/training.py",
            'np.random.default_rng(patient_seed(secret, patient.key, "augmentation"))',
            'self.__dict__.setdefault("rng", np.random.default_rng(0))',
        ),
        caught_by=(
            f"{TRAINING}::TestTwins::test_augmentation_belongs_to_patient_and_step",
            f"{TWINS}::TestTrainingPatient::test_hostile_patient_shows_in_the_parameters_alone[an ordinary one]",
        ),
        nine=True,
    ),
    patch(
        "BatchNorm in a network",
        ("shared_models/networks/unet.py", 'norm=("INSTANCE", {"affine": True})', 'norm="BATCH"'),
        caught_by=(
            f"{TRAINING}::TestNetworkContract::test_every_network_of_the_house_keeps_it",
            "tests/test_contracts.py::TestEveryNetwork::test_training_changes_no_buffer",
        ),
        nine=True,
    ),
)

_MECHANISM = (
    patch(
        "clip without its last check",
        ("client/privacy.py", "if int(squares.sum()) > mechanism.largest_square:", "if False:"),
        caught_by=(f"{PRIVACY}::TestClipping::test_integers_that_are_too_long_all_the_same_count_for_nothing",),
    ),
    patch(
        "rounding at random at the clip",
        (
            "client/privacy.py",
            "if longest < math.sqrt(mechanism.largest_square) * (1 - MARGIN):",
            "if True:",
        ),
        caught_by=(f"{PRIVACY}::TestClipping::test_million_values_at_the_clip_stay_below_it",),
    ),
    patch(
        "no noise",
        (
            "client/privacy.py",
            "part += randomness.gaussian(len(part), self.mechanism.sigma)",
            "randomness.gaussian(len(part), self.mechanism.sigma)",
        ),
        caught_by=(
            f"{PRIVACY}::TestNoisedSum::test_empty_sum_is_noised_all_the_same",
            f"{CANARIES}::test_patients_of_a_private_run_cannot_be_told_from_those_who_stayed_away",
            f"{INVERSION}::test_with_privacy_the_image_stays_here",
        ),
    ),
    patch(
        "noise missing on the last part",
        (
            "client/privacy.py",
            "for start in range(0, len(total), CHUNK):",
            "for start in range(0, len(total) - CHUNK // 2, CHUNK):",
        ),
        caught_by=(
            f"{PRIVACY}::TestNoisedSum::test_empty_sum_is_noised_all_the_same",
            f"{TRAINING}::TestNoiseAlone::test_nobody_to_train_on_still_gives_every_step_its_noise",
        ),
    ),
    patch(
        "noise in the first step only",
        (
            "client/training.py",
            "self._private_step(optimizer, steering, total.noised(self.randomness))",
            "self._private_step(optimizer, steering, total.noised(self.randomness) if step == 0 else "
            "total.integers.double() * (mechanism.grid / mechanism.divisor))",
        ),
        caught_by=(
            f"{TRAINING}::TestNoiseAlone::test_every_tensor_moves_by_the_noise_that_was_paid_for",
            f"{OUTSIDE}::TestStation::test_ledger_is_what_a_second_accountant_finds_at_the_source_of_noise",
        ),
    ),
    patch(
        "rate from the private size",
        (
            "client/training.py",
            "Mechanism.of(privacy, declared_size=declared_size,",
            'Mechanism.of(privacy, declared_size=len(cohort.patients("train")),',
        ),
        caught_by=(
            f"{TRAINING}::TestNoiseAlone::test_noise_and_rates_are_those_of_the_plan_for_any_private_size",
            f"{OUTSIDE}::TestStation::test_ledger_is_what_a_second_accountant_finds_at_the_source_of_noise",
        ),
    ),
    patch(
        "shared stream inside the network",
        (
            "client/training.py",
            'torch.manual_seed(patient_seed(secret, patient.key, "torch"))',
            "pass",
        ),
        caught_by=(f"{TRAINING}::TestTwins::test_randomness_inside_the_network_belongs_to_patient_and_step",),
    ),
    patch(
        "largest samples truncated",
        (
            "client/privacy.py",
            "np.flatnonzero(randomness.coins(n, mechanism.sampling_rate))]",
            "np.flatnonzero(randomness.coins(n, mechanism.sampling_rate))][: mechanism.divisor]",
        ),
        caught_by=(f"{OUTSIDE}::TestSampling::test_number_of_patients_in_a_step_is_binomial",),
    ),
    patch(
        "coins kept for two steps",
        (
            "client/training.py",
            "gradients.add_to(total, chosen(len(gradients), mechanism, self.randomness), self.randomness.secret())",
            "who = chosen(len(gradients), mechanism, self.randomness) if step % 2 == 0 else who\n"
            "                gradients.add_to(total, who, self.randomness.secret())",
        ),
        caught_by=(f"{OUTSIDE}::TestSampling::test_steps_are_independent",),
    ),
    patch(
        "empty step skipped",
        (
            "client/training.py",
            "                self._private_step(optimizer, steering, total",
            "                if not bool(total.integers.any()):\n                    continue\n"
            "                self._private_step(optimizer, steering, total",
        ),
        caught_by=(f"{TRAINING}::TestNoiseAlone::test_nobody_to_train_on_still_gives_every_step_its_noise",),
    ),
    patch(
        "NaN passes the clip",
        ("client/privacy.py", "if not math.isfinite(norm):", "if False:"),
        caught_by=(f"{PRIVACY}::TestClipping::test_value_that_is_not_finite_silences_the_patient",),
    ),
    patch(
        "bits never settled",
        ("client/privacy.py", "ERROR = 2e-11", "ERROR = 0.0"),
        caught_by=(f"{PRIVACY}::TestRoundedGaussian::test_further_bits_settle_what_64_leave_open",),
    ),
    patch(
        "tail that a word ends",
        ("client/privacy.py", "(magnitude >= SURE_BELOW)", "False"),
        caught_by=(f"{PRIVACY}::TestRoundedGaussian::test_tail_has_no_end_that_a_word_sets",),
    ),
    patch(
        "stream kept over forks",
        (
            "client/privacy.py",
            "    stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(4) + os.urandom(12)), mode=None).encryptor()",
            "    stream = _random_words.__dict__.setdefault(\n"
            '        "stream", Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()\n    )',
        ),
        caught_by=(
            f"{PRIVACY}::TestSystemRandomness::test_child_process_draws_its_own",
            f"{OUTSIDE}::TestProcesses::test_forked_workers_and_fresh_interpreters_share_no_noise",
        ),
    ),
    patch(
        "grid too coarse",
        ("client/privacy.py", "GRID_BITS = 20", "GRID_BITS = 12"),
        caught_by=(f"{PRIVACY}::TestMechanism::test_grid_is_fine_enough_and_public",),
    ),
)

_LOOP = (
    patch(
        "bad patient ends the round",
        (
            "client/privacy.py",
            "        except Exception as error:\n            reason = type(error).__name__",
            "        except ZeroDivisionError as error:\n            reason = type(error).__name__",
        ),
        caught_by=(
            f"{TRAINING}::TestTwins::test_silent_patient_changes_nothing_of_the_round",
            f"{TWINS}::TestTrainingPatient::test_hostile_patient_shows_in_the_parameters_alone[truncated file]",
            f"{TWINS}::TestMeasuredPatient::test_hostile_patient_shows_in_the_metrics_alone[validation-3-truncated file]",
            f"{MOMENTS}::TestPrivately::test_patient_who_cannot_be_described_adds_nothing_and_stays_silent",
        ),
    ),
    patch(
        "split remembered from one patient to the next",
        (
            "client/training.py",
            "        at_once = len(samples)\n        while True:",
            "        at_once = self.__dict__.get('once', len(samples))\n"
            "        while True:\n            self.once = at_once",
        ),
        caught_by=(f"{TRAINING}::TestMemory::test_each_patient_starts_from_the_whole_again",),
    ),
    patch(
        "parts of a patient add up instead of their mean",
        (
            "client/training.py",
            "loss = self._task.loss(output.to(like), target) * (len(part) / len(samples))",
            "loss = self._task.loss(output.to(like), target)",
        ),
        caught_by=(f"{TRAINING}::TestMemory::test_smaller_physical_batches_give_the_same_update",),
    ),
    patch(
        "proximal term lost",
        (
            "client/training.py",
            "        steering.act()\n        optimizer.step()\n        optimizer.zero",
            "        optimizer.step()\n        optimizer.zero",
        ),
        caught_by=(f"{TRAINING}::TestStep::test_weight_decay_and_proximal_term_act_after_the_noise",),
    ),
    patch(
        "norms of FedBN leave the site",
        ("client/side.py", "{name: array for name, array in update.items() if name not in stays}", "update"),
        caught_by=("tests/client/test_side.py::TestFedBN::test_norms_never_leave_and_stay_as_they_were_at_the_server",),
    ),
    patch(
        "failure of an own model ends the round under privacy",
        ("client/side.py", "if self.plan.privacy is None:\n                raise", "if True:\n                raise"),
        caught_by=("tests/client/test_side.py::TestOthers::test_failure_of_the_own_model_is_no_sign_under_privacy",),
    ),
    patch(
        "own part taken from a round that was begun and not answered",
        ("client/own.py", 'question.round - 1 if question.kind == "train" else question.round', "question.round"),
        caught_by=(
            "tests/client/test_side.py::TestKept::test_asked_again_it_gives_the_same_whatever_was_kept_since[scaffold]",
        ),
    ),
    patch(
        "network checked on weights that somebody sent",
        (
            "client/training.py",
            "check_network(self.task.build_network().to(self.device), self.task)",
            "check_network(self.network, self.task)",
        ),
        caught_by=(f"{TRAINING}::TestNetworkContract::test_trainer_refuses_such_a_network_whatever_weights_arrive",),
    ),
    patch(
        "network not checked",
        ("client/training.py", "        self._check_once()\n", ""),
        caught_by=(f"{TRAINING}::TestNetworkContract::test_trainer_refuses_such_a_network_whatever_weights_arrive",),
    ),
    patch(
        "buffers that change are not seen",
        ("client/network_contract.py", "not _same(buffers, _buffers(tried))", "False"),
        caught_by=(f"{TRAINING}::TestNetworkContract::test_layer_through_which_patients_meet_is_refused",),
    ),
    patch(
        "company in the batch is not seen",
        ("client/network_contract.py", "_mixed(batch), of=0)", "batch, of=0)"),
        caught_by=(f"{TRAINING}::TestNetworkContract::test_layer_through_which_patients_meet_is_refused",),
    ),
    patch(
        "predictions that change are not seen",
        ("client/network_contract.py", "not _same([shown], [_prediction(tried, first)])", "False"),
        caught_by=(f"{TRAINING}::TestNetworkContract::test_layer_through_which_patients_meet_is_refused",),
    ),
    patch(
        "plain training takes private plans",
        ("client/training.py", "if self.plan.privacy is not None:\n            raise", "if False:\n            raise"),
        caught_by=(f"{TRAINING}::TestFailClosed::test_plain_training_refuses_a_private_plan",),
    ),
    patch(
        "less noise than the plan gives",
        ("client/training.py", "privacy.noise_multiplier not in (None, noise_multiplier)", "False"),
        caught_by=(f"{TRAINING}::TestFailClosed::test_private_training_refuses_another_plan_and_other_noise",),
    ),
    patch(
        "one secret for all steps",
        ("client/training.py", "self.randomness.secret())", "bytes(32))"),
        caught_by=(f"{TRAINING}::TestTwins::test_augmentation_belongs_to_patient_and_step",),
    ),
    patch(
        "Opacus reads any memory",
        ("client/image_privacy.py", "value.contiguous() if isinstance(value, Tensor) else value for", "value for"),
        caught_by=(f"{IMAGES}::TestSampleGradients::test_input_in_another_memory_order_gives_the_right_gradient",),
    ),
    patch(
        "Opacus unchecked",
        ("client/image_privacy.py", "if not bool((difference <= TOLERANCE).all()):", "if False:"),
        caught_by=(f"{IMAGES}::TestSampleGradients::test_parameter_used_through_two_modules_is_refused",),
    ),
    patch(
        "samples of an image add up instead of their mean",
        (
            "client/image_privacy.py",
            "reshape(len(drawn), self._n_samples, -1).mean(1)",
            "reshape(len(drawn), self._n_samples, -1).sum(1)",
        ),
        caught_by=(f"{IMAGES}::TestSampleGradients::test_clipped_sum_is_that_of_a_loop",),
    ),
    patch(
        "more images of a patient than were counted on",
        (
            "client/image_privacy.py",
            "images += _of_patient(cohort, patient, dimensions)[:most]",
            "images += _of_patient(cohort, patient, dimensions)",
        ),
        caught_by=(f"{IMAGES}::TestImages::test_no_patient_has_more_images_than_the_plan_counts_on",),
    ),
)

_PLANS = (
    patch(
        "best model by exact measurements",
        ("shared_models/plan.py", 'self.strategy.release == "best"', "False"),
        caught_by=(f"{PLAN}::TestPrivacy::test_contradiction_is_refused_with_a_way_out",),
    ),
    patch(
        "epochs ignored",
        ("shared_models/plan.py", "        if key in training:", "        if False:"),
        caught_by=(f"{PLAN}::TestPrivacy::test_contradiction_is_refused_with_a_way_out",),
    ),
    patch(
        "hash over keys without meaning",
        ("shared_models/plan.py", 'del tables["training"][key]', "pass"),
        caught_by=(f"{PLAN}::TestPrivacy::test_stored_form_is_read_as_the_same_plan_on_every_way",),
    ),
    patch(
        "metrics beyond their range",
        ("shared_models/noised.py", "(min(max(value, low), high) - low)", "(value - low)"),
        caught_by=(f"{NOISED}::TestVector::test_no_patient_is_longer_than_the_clip",),
    ),
)

_LEDGER = (
    patch(
        "only settled charges count",
        (
            "client/ledger.py",
            '        if entry["event"] == "charge"\n',
            '        if entry["event"] == "charge" and any(e.get("charge") == entry["n"] for e in entries)\n',
        ),
        caught_by=(
            f"{LEDGER}::TestCharges::test_charge_is_there_before_the_first_step",
            f"{STATION}::TestCost::test_training_that_fails_stays_paid_and_is_paid_again",
        ),
    ),
    patch(
        "a charge settled twice",
        (
            "client/ledger.py",
            "if charge.is_private and (charge.question != question or charge.n in spent.settled):",
            "if False:",
        ),
        caught_by=(f"{LEDGER}::TestCharges::test_reservation_is_settled_once_and_for_its_question",),
    ),
    patch(
        "caps not checked at the charge",
        ("client/ledger.py", "            check_caps(spent, question.run, asked_for, caps)\n", ""),
        caught_by=(
            f"{LEDGER}::TestCaps::test_third_run_is_refused_before_its_first_step",
            f"{STATION}::TestCost::test_run_beyond_the_lifetime_cap_is_refused_before_its_first_step",
        ),
    ),
    patch(
        "run begun that does not fit as a whole",
        (
            "client/ledger.py",
            "asked_for = events if question.run in spent.runs else whole_run",
            "asked_for = events",
        ),
        caught_by=(f"{LEDGER}::TestCaps::test_run_that_does_not_fit_as_a_whole_is_not_begun",),
    ),
    patch(
        "lifetime of the dearest run alone",
        (
            "client/ledger.py",
            "rdp_to_epsilon(sum(rdp(events, order) for events in runs.values()), order, delta)",
            "rdp_to_epsilon(max((rdp(events, order) for events in runs.values()), default=0.0), order, delta)",
        ),
        caught_by=(
            f"{LEDGER}::TestCharges::test_runs_add_up_at_one_order",
            f"{STATION}::TestCost::test_run_beyond_the_lifetime_cap_is_refused_before_its_first_step",
        ),
    ),
    patch(
        "order chosen anew for every run",
        (
            "client/ledger.py",
            "    if spent.order is not None or math.isinf(caps.lifetime):\n        return spent.order\n",
            "    if math.isinf(caps.lifetime):\n        return None\n",
        ),
        (
            "client/ledger.py",
            "(charge.order for charge in self.charges if",
            "(charge.order for charge in self.charges[::-1] if",
        ),
        caught_by=(f"{LEDGER}::TestCaps::test_cap_that_was_raised_keeps_its_order",),
    ),
    patch(
        "lost history counts as nothing",
        ("client/ledger.py", 'is_lost=bool(entries[0].get("lost"))', "is_lost=False"),
        caught_by=(f"{LEDGER}::TestPutBack::test_beginning_anew_counts_everything_as_spent",),
    ),
    patch(
        "missing ledger starts at zero",
        ("client/ledger.py", "if trace := _trace_of_history(folder):", 'if trace := "":'),
        caught_by=(f"{LEDGER}::TestPutBack::test_missing_ledger_does_not_start_at_zero",),
    ),
    patch(
        "ledger that cannot be read goes on",
        (
            "client/chain.py",
            'raise _not_whole(self.database, f"entry {len(entries) + 1} was changed, or does not belong there")',
            "break",
        ),
        ("client/chain.py", "            self._compare(lines, anchored)\n", ""),
        caught_by=(
            f"{LEDGER}::TestChanged::test_changed_entry_is_found",
            f"{STATION}::TestNo::test_ledger_that_cannot_be_trusted_stops_everything",
        ),
    ),
    patch(
        "hashes not compared",
        (
            "client/chain.py",
            "return whole if follows and line == _canonical(whole) else None",
            "return whole if follows else None",
        ),
        caught_by=(f"{LEDGER}::TestChanged::test_entry_changed_in_both_places_is_found",),
    ),
    patch(
        "rollback unnoticed",
        (
            "client/chain.py",
            "raise _rolled_back(self.database, self.anchor, len(lines), len(anchored))",
            "return",
        ),
        caught_by=(
            f"{LEDGER}::TestPutBack::test_older_ledger_is_noticed_whenever_it_was_copied",
            f"{LIAR}::TestSequences::test_no_sequence_of_questions_kills_and_restores_gets_more_than_was_paid_for",
        ),
    ),
    patch(
        "anchor ignored",
        ("client/chain.py", "            self._compare(lines, anchored)\n", ""),
        caught_by=(
            f"{LEDGER}::TestPutBack::test_older_ledger_is_noticed_whenever_it_was_copied",
            f"{LEDGER}::TestAnchor::test_changed_anchor_is_found",
        ),
    ),
    patch(
        "anchor one entry late",
        (
            "client/chain.py",
            '            yield book\n            db.execute("COMMIT")\n            self._write_anchor(book.new)\n',
            '            yield book\n            db.execute("COMMIT")\n',
        ),
        caught_by=(f"{LEDGER}::TestPutBack::test_charge_is_at_its_anchor_before_the_first_step",),
    ),
    patch(
        "other weights for a round that was charged",
        ("client/ledger.py", "            raise OtherWeightsError\n", "            continue\n"),
        caught_by=(f"{LEDGER}::TestCharges::test_question_is_bound_to_its_weights_from_the_charge_on",),
    ),
    patch(
        "plan approved anew with another size after it trained",
        ("client/ledger.py", "if before and charged:", "if False:"),
        caught_by=(f"{LEDGER}::TestAgreements::test_plan_may_be_approved_anew_until_it_has_trained",),
    ),
)

_ACCOUNTING = (
    patch(
        "no noise costs nothing",
        (
            "client/accounting.py",
            "    if not all(event.is_private for event in events):\n        return math.inf\n    return _by_prv",
            "    events = tuple(event for event in events if event.is_private)\n    if not events:\n        return 0.0\n"
            "    return _by_prv",
        ),
        caught_by=(f"{ACCOUNTING}::TestEpsilon::test_nothing_costs_nothing_and_no_noise_costs_everything",),
    ),
    patch(
        "steps counted once",
        (
            "client/accounting.py",
            "steps[replace(event, steps=1)] += event.steps",
            "steps[replace(event, steps=1)] = event.steps",
        ),
        caught_by=(
            f"{ACCOUNTING}::TestEpsilon::test_order_and_packaging_make_no_difference",
            f"{STATION}::TestCost::test_epsilon_is_what_a_second_accountant_finds",
        ),
    ),
    patch(
        "images of a patient counted as one",
        (
            "client/accounting.py",
            '    if any(e.unit == "image" and e.images_per_patient > 1 for e in events):\n'
            "        return min(bound, _by_mixture(events, delta))\n",
            "",
        ),
        (
            "client/accounting.py",
            "_rdp_of_kind(event.noise_multiplier, event.sampling_rate, event.images_per_patient, order)",
            "_rdp_of_kind(event.noise_multiplier, event.sampling_rate, 1, order)",
        ),
        caught_by=(
            f"{ACCOUNTING}::TestImageLevel::test_published_table_is_met",
            f"{ACCOUNTING}::TestImageLevel::test_cost_for_a_patient_is_what_counts",
        ),
    ),
    patch(
        "rounds of image-level plans charged for images",
        (
            "client/policy.py",
            "self.sampling_rate, steps, unit=self.unit, images_per_patient=self.images_per_patient\n",
            "self.sampling_rate, steps\n",
        ),
        caught_by=(f"{POLICY}::TestCost::test_rounds_add_up_to_the_run",),
    ),
    patch(
        "noise for one round and not for the run",
        (
            "client/policy.py",
            "    steps = privacy.steps_per_round * plan.rounds\n",
            "    steps = privacy.steps_per_round\n",
        ),
        caught_by=(f"{POLICY}::TestCost::test_rounds_add_up_to_the_run",),
    ),
    patch(
        "metrics for free",
        (
            "client/policy.py",
            'metrics = self._metrics(1, "validation") if self.has_metrics(round_) else ()',
            "metrics = ()",
        ),
        caught_by=(f"{POLICY}::TestCost::test_metrics_are_priced_with_the_run",),
    ),
    patch(
        "noise looked for again in every round",
        ("client/policy.py", "(agreed.noise_multiplier if agreed else None)\n        or privacy", "privacy"),
        caught_by=(f"{POLICY}::TestCost::test_what_was_agreed_stands",),
    ),
    patch(
        "delta beyond one patient in all",
        ("client/policy.py", "if privacy.delta > lifetime_delta:", "if False:"),
        caught_by=(f"{POLICY}::TestCost::test_delta_must_fit_the_site",),
    ),
)

_DOOR = (
    patch(
        "smallest cohort ignored",
        ("client/policy.py", "if n_patients < self.minimum_patients:", "if False:"),
        caught_by=(f"{POLICY}::TestApproval::test_too_few_patients_are_told_here_and_not_there",),
    ),
    patch(
        "hours ignored",
        ("client/policy.py", "if not is_open(self.hours, now.time()):", "if False:"),
        caught_by=(f"{POLICY}::TestRound::test_round_outside_the_hours_is_refused_by_the_clock",),
    ),
    patch(
        "rounds beyond the last",
        ("client/policy.py", "if round_ > min(plan.rounds, self.max_rounds):", "if False:"),
        caught_by=(f"{POLICY}::TestRound::test_round_beyond_the_last_is_refused",),
    ),
    patch(
        "policy ignored at the round",
        (
            "client/station.py",
            "        if isinstance(decision, Refused):\n            log.warning",
            "        if False:\n            log.warning",
        ),
        caught_by=(f"{STATION}::TestNo::test_policy_that_changes_its_mind_ends_a_run",),
    ),
    patch(
        "runs without privacy permitted",
        ("client/policy.py", "if plan.privacy is None and not self.without_privacy:", "if False:"),
        caught_by=(
            f"{POLICY}::TestApproval::test_plan_without_privacy_needs_a_word",
            f"{STATION}::TestNo::test_plan_without_privacy_is_not_approved_by_default",
        ),
    ),
    patch(
        "exact size declared",
        ("client/station.py", "if plan.privacy is None or self.config.emulated:", "if True:"),
        caught_by=(f"{STATION}::TestNo::test_size_is_declared_by_a_person",),
    ),
    patch(
        "size that is not rounded",
        ("client/policy.py", "if declared >= 1 and round_size(declared) == declared:", "if declared >= 1:"),
        caught_by=(f"{POLICY}::TestDeclaredSize::test_exact_number_is_c173",),
    ),
    patch(
        "charged after training",
        (
            "client/station.py",
            "            reservation = self._paid(question, plan, cost, ledger)\n",
            "            reservation = Reservation(0, question, 0.0, 0.0)\n",
        ),
        (
            "client/station.py",
            "        passed = self._gate.release(question, releases, is_private",
            "        reservation = self._paid(question, plan, cost, ledger)\n"
            "        passed = self._gate.release(question, releases, is_private",
        ),
        caught_by=(
            f"{STATION}::TestCost::test_training_that_fails_stays_paid_and_is_paid_again",
            f"{STATION}::TestCost::test_run_beyond_the_lifetime_cap_is_refused_before_its_first_step",
            f"{LIAR}::TestKilled::test_killed_between_the_lines_of_an_answer",
        ),
    ),
    patch(
        "answer leaves before it is stored",
        (
            "client/station.py",
            "        sha256 = ledger.settle(reservation, question, passed.answer, audit=self.audit.head)\n",
            "        sha256 = hashlib.sha256(passed.answer).hexdigest()\n",
        ),
        caught_by=(
            f"{STATION}::TestCost::test_asked_twice_it_pays_once",
            f"{LIAR}::TestKilled::test_killed_before_any_durable_write_of_an_answer",
        ),
    ),
    patch(
        "answer computed again when asked again",
        ("client/station.py", "(stored := known.answer) is not None", "(stored := None) is not None"),
        ("client/ledger.py", '        if entry["event"] == "answer":\n            raise AnsweredBeforeError\n', ""),
        ("client/answers.py", '"INSERT INTO answers VALUES', '"INSERT OR REPLACE INTO answers VALUES'),
        caught_by=(
            f"{STATION}::TestCost::test_asked_twice_it_pays_once",
            f"{LIAR}::TestSequences::test_no_sequence_of_questions_kills_and_restores_gets_more_than_was_paid_for",
        ),
    ),
    patch(
        "exact values pass the gate under privacy",
        ("client/gate.py", "if is_private and not release.is_noised:", "if False:"),
        (
            "client/gate.py",
            'rule == "forbidden" or (rule == "noised" and not release.is_noised)',
            'rule == "forbidden"',
        ),
        caught_by=(f"{GATE}::TestPrivacy::test_what_has_no_noise_is_stopped",),
    ),
    patch(
        "a policy that allows counts lets them out under privacy",
        ("client/gate.py", "if is_private and not release.is_noised:", "if False:"),
        caught_by=(f"{GATE}::TestPrivacy::test_what_has_no_noise_is_stopped",),
    ),
    patch(
        "fingerprint without noise",
        (
            "client/fingerprint.py",
            "return np.asarray(total.noised(randomness).numpy()) / cost.sampling_rate",
            "return total.integers.numpy() * mechanism.grid",
        ),
        caught_by=(
            f"{FINGERPRINT}::TestWhatLeaves::test_noised_counts_leave_with_their_cost",
            f"{FINGERPRINT}::TestWhatLeaves::test_deviation_of_the_noise_is_what_the_server_reckons",
        ),
    ),
    patch(
        "fingerprint for whoever approved training",
        ("client/station.py", 'if (question.kind == "fingerprint") != (plan.asks == "fingerprint"):', "if False:"),
        caught_by=(f"{FINGERPRINT}::TestWhoSaysNo::test_plan_that_trains_is_no_leave_to_count",),
    ),
    patch(
        "fingerprint in which each study counts",
        (
            "shared_models/fingerprint.py",
            "return np.mean(rows, axis=0) if rows else np.zeros(N_VALUES)",
            "return np.sum(rows, axis=0) if rows else np.zeros(N_VALUES)",
        ),
        caught_by=(
            "tests/shared_models/test_self_configuration.py::TestFingerprint::"
            "test_patient_counts_once_however_many_studies",
        ),
    ),
    patch(
        "metrics without noise",
        (
            "client/work.py",
            "return means.means(total.noised(trainer.randomness).numpy())",
            "return means.means((total.integers.double() * (mechanism.grid / mechanism.divisor)).numpy())",
        ),
        caught_by=(
            f"{STATION}::TestWhatLeaves::test_metrics_leave_in_the_rounds_that_the_plan_names_and_are_noised",
            f"{OUTSIDE}::TestStation::test_metrics_have_the_variance_that_was_paid_for",
        ),
    ),
    patch(
        "metrics over the private number of patients",
        (
            "client/work.py",
            "means = NoisedMeans.of(trainer.task, split, declared_size)",
            "means = NoisedMeans.of(trainer.task, split, declared_size)\n"
            '    object.__setattr__(means, "n_patients", len(cohort.patients(split)))',
        ),
        caught_by=(
            f"{TWINS}::TestMeasuredPatient::test_hostile_patient_shows_in_the_metrics_alone[validation-3-an ordinary one]",
        ),
    ),
    patch(
        "true number of patients leaves",
        (
            "client/work.py",
            '"declared_size": cost.declared_size}',
            '"declared_size": len(cohort.patients("train"))}',
        ),
        caught_by=(
            f"{STATION}::TestWhatLeaves::test_update_leaves_with_its_cost_and_no_number_of_patients",
            f"{TWINS}::TestTrainingPatient::test_hostile_patient_shows_in_the_parameters_alone[an ordinary one]",
        ),
    ),
    patch(
        "number of patients in the audit that may be shown",
        (
            "client/station.py",
            "sha256, again=False, released=released, **left_out)",
            'sha256, again=False, released=released, **left_out, patients=len(cohort.patients("train")))',
        ),
        caught_by=(
            f"{TWINS}::TestTrainingPatient::test_hostile_patient_shows_in_the_parameters_alone[an ordinary one]",
        ),
    ),
    patch(
        "progress in steps",
        ("client/station.py", "tick = TICKS * done // max(total, 1)", "tick = done"),
        caught_by=(f"{ANY_STATION}::TestProgress::test_at_most_ten_ticks_that_never_tell_a_number_of_steps",),
    ),
    patch(
        "reasons of one's own",
        ("client/gate.py", "if refusal not in get_args(Refusal):", "if False:"),
        caught_by=(f"{GATE}::TestRefuse::test_word_that_is_not_on_the_list_is_stopped",),
    ),
    patch(
        "answers that the audit does not tell",
        (
            "client/station.py",
            "self._audit_answer(question, len(passed.answer), sha256, again=False, released=released, **left_out)\n",
            "pass\n",
        ),
        caught_by=(
            f"{STATION}::TestNo::test_refusal_is_in_the_audit",
            f"{LIAR}::TestKilled::test_killed_between_the_lines_of_an_answer",
        ),
    ),
)

_TOLD = (
    patch(
        "name of a metric missing from the manifest",
        ("client/gate.py", '{"names": sorted(values)}', '{"names": sorted(values)[1:]}'),
        caught_by=(f"{GATE}::TestRelease::test_manifest_says_what_left_and_no_value_of_it",),
    ),
    patch(
        "norm missing from the manifest",
        (
            "client/gate.py",
            '"norm": norm}',
            '"norm": 0.0}',
        ),
        caught_by=(
            f"{GATE}::TestRelease::test_manifest_says_what_left_and_no_value_of_it",
            f"{EGRESS}::TestManifest::test_every_answer_of_a_station_stands_there",
        ),
    ),
    patch(
        "cost missing from the manifest",
        (
            "client/gate.py",
            'return {"values": dict(values)} if kind == "cost"',
            'return {"values": {}} if kind == "cost"',
        ),
        caught_by=(
            f"{GATE}::TestRelease::test_manifest_says_what_left_and_no_value_of_it",
            f"{STATION}::TestWhatLeaves::test_audit_tells_what_left_and_at_what_cost",
        ),
    ),
    patch(
        "metrics that the audit does not tell",
        (
            "client/egress.py",
            "    said = dict(manifest)\n",
            '    said = {kind: what for kind, what in manifest.items() if kind != "metric"}\n',
        ),
        caught_by=(
            f"{EGRESS}::TestManifest::test_line_for_a_person_says_what_left",
            f"{STATION}::TestWhatLeaves::test_audit_tells_what_left_and_at_what_cost",
        ),
    ),
    patch(
        "scanners counted among patients",
        (
            "client/training.py",
            "        if plan.privacy is None:\n            told_apart",
            "        if True:\n            told_apart",
        ),
        caught_by=(f"{ADAPTED}::TestPrivately::test_declared_scanners_decide_whether_a_discriminator_trains",),
    ),
    patch(
        "studies without a reference under privacy",
        ("shared_models/plan.py", "return self.is_adversarial and self.privacy is None", "return self.is_adversarial"),
        caught_by=(f"{PLAN}::TestAdaptation::test_unlabelled_studies_take_part_without_privacy_alone",),
    ),
    patch(
        "labels counted under privacy",
        (
            "shared_models/plan.py",
            "if self.training.balanced is not None and self.privacy is not None:",
            "if False:",
        ),
        caught_by=(f"{PLAN}::TestClassification::test_balance_that_is_counted_is_refused_under_privacy",),
    ),
    patch(
        "reversed gradient bounded by the batch",
        (
            "shared_models/adaptation.py",
            "    norm = gradient.flatten(1).float().norm(dim=1)\n",
            "    norm = gradient.flatten(1).float().norm(dim=1).mean().expand(len(gradient))\n",
        ),
        caught_by=(f"{ADAPTATION}::TestAdversary::test_bound_of_a_sample_is_its_own",),
    ),
    patch(
        "forbidden notices leave",
        (
            "client/gate.py",
            'and self._policy.rule(cast("NoticeKind", release.kind), private=False) == "forbidden"',
            "and False",
        ),
        caught_by=(
            f"{GATE}::TestPolicyOfNotices::test_notice_that_the_hospital_forbids_stays",
            f"{ANY_STATION}::TestNotices::test_what_the_hospital_forbids_is_neither_told_nor_laid_out_for_it",
        ),
    ),
    patch(
        "station's gate without its policy",
        ("client/station.py", "Gate(self.config.name, self.config.permits)", "Gate(self.config.name)"),
        caught_by=(
            f"{ANY_STATION}::TestNotices::test_what_the_hospital_forbids_is_neither_told_nor_laid_out_for_it",
            f"{STATION}::TestWhatLeaves::test_metrics_that_the_hospital_forbids_stay",
        ),
    ),
    patch(
        "word for a foreign start not in the audit",
        ("client/station.py", "code=self._code, **said)", "code=self._code)"),
        caught_by=(f"{STATION}::TestWarmStart::test_model_of_which_the_ledger_knows_nothing_needs_a_word_from_here",),
    ),
    patch(
        "any model is where training begins",
        ("shared_models/start.py", "(found := hashlib.sha256(data).hexdigest()) != wanted", '(found := "")'),
        caught_by=("tests/shared_models/test_start.py::TestFirstWeights::test_another_model_is_refused",),
    ),
    patch(
        "average over rounds not released",
        ("server/rounds.py", "            best = self._average\n", "            best = self._weights\n"),
        caught_by=(AVERAGE,),
    ),
    patch(
        "average that forgets all rounds but the last",
        ("shared_models/weights.py", "    share = (1 - decay) / (1 - decay**number)\n", "    share = 1.0\n"),
        caught_by=(AVERAGE,),
    ),
    patch(
        "cost missing on the model card",
        ("server/registry.py", "SitePrivacy.of(cost[name]) if name in cost else None", "None"),
        caught_by=("tests/server/test_registry.py::TestCard::test_privacy_of_every_site_stands_there",),
    ),
    patch(
        "noise missing on the model card",
        ("server/registry.py", "test_interval=around.get(name) or None", "test_interval=None"),
        ("server/registry.py", "test_interval=intervals(plan, sites)[0] or None", "test_interval=None"),
        caught_by=("tests/server/test_registry.py::TestCard::test_noised_figures_stand_with_their_interval",),
    ),
    patch(
        "costs of any kind are read",
        ("shared_models/messages.py", 'if cost and not COST <= cost.keys() <= COST | {"image_epsilon"}:', "if False:"),
        caught_by=(
            "tests/shared_models/test_messages.py::TestHostileAnswers::test_header_that_is_not_an_answer_is_refused",
        ),
    ),
    patch(
        "test figures without their noise",
        ("server/results.py", '"interval": list(around[name])', '"interval": [value, value]'),
        caught_by=(f"{RESULTS}::TestWithPrivacy::test_interval_is_that_of_the_noise_of_the_declared_size",),
    ),
    patch(
        "test figures that nobody paid for",
        ("server/results.py", "        if name in around\n", ""),
        ("server/results.py", "list(around[name])", "list(around.get(name, (value, value)))"),
        caught_by=(f"{RESULTS}::TestWithPrivacy::test_what_no_mechanism_made_is_left_out",),
    ),
    patch(
        "real patients measured exactly for a comparison",
        ("simulation/run.py", "    return all(is_emulated(site.data) for site in sites)\n", "    return True\n"),
        ("simulation/baselines.py", "    if not all(is_emulated(site.data) for site in sites):\n", "    if False:\n"),
        caught_by=(
            f"{COMPARISON}::TestRun::test_real_hospitals_get_no_comparison",
            f"{COMPARISON}::TestSteps::test_real_patients_are_not_trained_on_beside_the_run",
        ),
    ),
)

_KEPT = (
    patch(
        "exclusions hold for new approvals only",
        ("client/station.py", "secret=self._secret, excluded=self._left_out())", "secret=self._secret)"),
        caught_by=(
            f"{LEAVING}::TestExclusion::test_excluded_patient_is_in_no_cohort_that_was_approved_before",
            f"{LEAVING}::TestExclusion::test_round_is_trained_without_the_excluded",
        ),
    ),
    patch(
        "a list of exclusions that cannot be read is an empty one",
        ("client/exclusions.py", 'raise _unusable(folder, "a line is no key")', "return frozenset()"),
        caught_by=(f"{LEAVING}::TestExclusion::test_list_that_cannot_be_read_stops_everything",),
    ),
    patch(
        "excluded patients' volumes stay on the disk",
        ("client/data/cohort.py", "        for entry in there:\n            rmtree(entry)\n", ""),
        caught_by=(f"{LEAVING}::TestExclusion::test_excluded_patient_is_in_no_cohort_that_was_approved_before",),
    ),
    patch(
        "sealed pieces can change places",
        ("client/data/sealed.py", 'return name + header + number.to_bytes(8, "big")', "return header"),
        caught_by=(f"{SEALED}::TestSeal::test_chunk_or_volume_in_the_place_of_another_is_refused",),
    ),
    patch(
        "one key for all cohorts",
        ("client/data/sealed.py", "HKDF(SHA256(), 48, salt, ", 'HKDF(SHA256(), 48, b"", '),
        caught_by=(f"{SEALED}::TestSeal::test_key_is_of_this_site_and_this_cohort",),
    ),
    patch(
        "private attributes pass",
        (
            "client/data/deidentify.py",
            "                del data[element.tag]\n            elif (action",
            "            elif (action",
        ),
        caught_by=(f"{DEIDENTIFIED}::TestTable::test_private_attributes_and_overlays_go_at_every_depth",),
    ),
    patch(
        "identifiers only on top are mapped",
        (
            "client/data/deidentify.py",
            '            elif element.VR == "SQ":\n                for item in element.value:\n'
            "                    self._clean(item, person)\n            elif element.VR in _TEXT",
            "            elif element.VR in _TEXT",
        ),
        caught_by=(f"{DEIDENTIFIED}::TestTable::test_every_attribute_gets_its_action_wherever_it_stands",),
    ),
    patch(
        "plan approved for other code",
        ("client/station.py", "if self._plans.code_of(plan.sha256) != self._code:", "if False:"),
        caught_by=(f"{ANY_STATION}::TestCode::test_code_that_changed_since_the_approval_computes_nothing",),
    ),
    patch(
        "a model predicts without its signature",
        (
            "client/inference.py",
            "release = verify_folder(_fetched(site, wanted), load_public(pin.plan_key_pem), pin.consortium)",
            "release = Release.open(_fetched(site, wanted))",
        ),
        caught_by=(f"{PREDICTED}::TestRefusals::test_model_that_is_not_the_signed_one_predicts_nothing",),
    ),
    patch(
        "a password goes to an archive without TLS",
        ("client/site.py", "if (self.user or self.token_file) and not is_web:", "if False:"),
        caught_by=(f"{IDENTITY}::TestConfiguration::test_what_does_not_fit_together_is_refused",),
    ),
    patch(
        "a password lies open",
        ("client/archive_identity.py", " or about.st_mode & 0o077:", ":"),
        caught_by=(f"{IDENTITY}::TestConfiguration::test_secret_that_is_none_is_refused",),
    ),
    patch(
        "any archive is believed",
        (
            "client/archive_identity.py",
            "    context.minimum_version = ssl.TLSVersion.TLSv1_2\n",
            "    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE\n",
        ),
        caught_by=(
            f"{IDENTITY}::TestTls::test_archive_of_another_authority_or_name_gets_nothing",
            f"{IDENTITY}::TestTls::test_listener_takes_nothing_from_whom_nobody_vouches_for",
        ),
    ),
)

_MOMENTS = (
    patch(
        "moments without noise",
        (
            "client/moments.py",
            "total.noised(trainer.randomness).numpy()",
            "(total.integers.double() * mechanism.grid).numpy()",
        ),
        caught_by=(f"{MOMENTS}::TestPrivately::test_nobody_there_releases_noise_of_the_size_that_was_paid_for",),
    ),
    patch(
        "moments clipped for each scanner",
        ("shared_models/moments.py", "clipped, squares]) / len(features)", "clipped, squares])"),
        (
            "client/moments.py",
            'add_vectors(total, cohort.patients("train"), vector_of, secret, "moments")',
            "for k in range(len(declared)):\n"
            "        only = torch.zeros(len(declared), layout.shape[1], dtype=torch.float64)\n"
            "        only[k] = 1\n"
            "        patients = cohort.patients('train')\n"
            "        add_vectors(total, patients, lambda one: vector_of(one) * only.ravel(), secret, '')",
        ),
        caught_by=(
            f"{MOMENTS}::TestPrivately::test_one_patient_more_moves_the_sum_by_at_most_the_clip",
            f"{LAYOUT}::TestLayout::test_one_patient_adds_a_vector_of_bounded_norm_over_all_scanners",
        ),
    ),
    patch(
        "moments of unclipped features",
        (
            "shared_models/moments.py",
            "clipped = feature * min(1.0, self.clip / max(float(np.linalg.norm(feature)), 1e-30))",
            "clipped = feature",
        ),
        caught_by=(f"{LAYOUT}::TestLayout::test_one_patient_adds_a_vector_of_bounded_norm_over_all_scanners",),
    ),
    patch(
        "moments that nobody is charged for",
        (
            "client/policy.py",
            "moments = _moment_events(self.moments_noise, 1) if round_ in self.moments_rounds else ()",
            "moments = ()",
        ),
        caught_by=(
            f"{POLICY}::TestCost::test_moments_are_priced_with_the_run",
            f"{MOMENTS}::TestStation::test_moments_leave_in_their_rounds_and_are_charged_with_them",
        ),
    ),
    patch(
        "moments missing in the price of a run",
        ("client/policy.py", "extra = (*metrics, *_moment_events(moments_noise, len(asked)))", "extra = metrics"),
        caught_by=(
            f"{POLICY}::TestCost::test_moments_are_priced_with_the_run",
            f"{MOMENTS}::TestStation::test_price_that_a_hospital_sees_before_it_approves_holds_them",
        ),
    ),
    patch(
        "moments of scanners found among patients",
        (
            "client/moments.py",
            "for name in cohort.declared_scanners or ()}",
            'for name in [cohort.scanner(s) for p in cohort.patients("train") for s in p.studies]}',
        ),
        caught_by=(f"{MOMENTS}::TestPrivately::test_rows_of_scanners_that_nobody_declared_are_zero",),
    ),
    patch(
        "exact moments of a few patients",
        ("client/moments.py", "total[n_patients < FEWEST] = 0", "total[n_patients < 1] = 0"),
        caught_by=(f"{MOMENTS}::TestExactly::test_scanner_with_too_few_patients_is_left_out",),
    ),
    patch(
        "moments that nobody asked for are taken",
        ("shared_models/moments.py", "if round_ not in moments_rounds(plan):", "if False:"),
        caught_by=(
            f"{LAYOUT}::TestFault::test_what_a_site_releases_is_taken",
            "tests/server/test_server_moments.py::TestRun::test_other_moments_are_refused_and_the_round_goes_on",
        ),
    ),
    patch(
        "discriminator forgotten by a run that goes on",
        (
            "server/moments.py",
            'rest, self.discriminator = parted(own, "discriminator.")',
            'rest, _ = parted(own, "d.")',
        ),
        caught_by=("tests/server/test_server_moments.py::TestRun::test_resumed_run_ends_on_the_same_bits",),
    ),
)

PATCHES = (*_THE_NINE, *_MECHANISM, *_LOOP, *_PLANS, *_LEDGER, *_ACCOUNTING, *_DOOR, *_TOLD, *_KEPT, *_MOMENTS)
